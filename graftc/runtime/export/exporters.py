"""The formats of an export, as data: how each one is prepared, and what it may replace."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, cast

from graftc.compiler.capture.interface import config_of
from graftc.records.files import PeftTensor
from graftc.runtime.artifact.write import require_values
from graftc.runtime.export.cached import export_cached
from graftc.runtime.export.cached import is_exported as is_cached
from graftc.runtime.export.exported_signature import exported_signature
from graftc.runtime.export.gguf.adapter import export_adapter, plain_of
from graftc.runtime.export.gguf.model import export_merged
from graftc.runtime.export.inputs import companions_of
from graftc.runtime.export.simplest import deployed
from graftc.runtime.export.writing import UNFOLDED, FoldEvidence, export_model
from graftc.runtime.interop.peft.exporting import export_peft, prepared
from graftc.runtime.interop.peft.exporting import is_exported as is_peft
from graftc.runtime.interop.peft.plain import plain
from graftc.runtime.interop.peft.servers import require_served, server_of
from graftc.runtime.interop.transformers import FoldedModel
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.model_runner import ModelRunner
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.options.exports import FORMATS

__all__ = ["EXPORTERS", "ExportJob", "Exporter", "ReadyExport"]


@dataclass(frozen=True)
class ExportJob:
    """A model to export, with the options of the format.

    Attributes:
        runner: the Runner of a compiled or merged model.
        options: the options of the format, as returned by `options_for`.
        evidence: the evidence of a fold to put into the files.
    """

    runner: ModelRunner
    options: Mapping[str, Any] = field(default_factory=dict)
    evidence: FoldEvidence = UNFOLDED

    @property
    def simplest(self) -> ModelRunner:
        """The model that a graph is written from, with adaptations in their simplest form."""
        return deployed(self.runner) if isinstance(self.runner, AdaptedRunner) else self.runner


@dataclass(frozen=True)
class ReadyExport:
    """An export that has passed all checks that are possible before files are written.

    Attributes:
        write: a function that writes the export, given a path and whether to replace what exists there.
        title: a readable name of the kind of adapters; empty for graphs and models.
        tensors: for adapters only, the key in the file, and site, part and name of the tensor in the model.
        max_rank: the largest rank, with which the server has to be started; None if it does not matter.
        needs: the option that sets it for the server; None if there is none.
    """

    write: Callable[[Path, bool], object]
    title: str = ""
    tensors: Sequence[PeftTensor] = ()
    max_rank: int | None = None
    needs: str | None = None


@dataclass(frozen=True)
class Exporter:
    """One format.

    Attributes:
        prepare: a function that prepares a job, or raises.
        check: a function that checks options before a model is loaded for them.
        folds: whether adaptations can be folded first.
        replaceable: a predicate of paths that ``force`` may replace.
        companions: a function that returns names of files that may be written beside an export, given its path and the
            adaptations that are inputs.
    """

    prepare: Callable[[ExportJob], ReadyExport]
    check: Callable[[Mapping[str, Any]], object] = lambda _: None
    folds: bool = True
    replaceable: Callable[[Path], bool] = Path.is_file
    companions: Callable[[Path, Sequence[str]], tuple[str, ...]] = lambda path, inputs: ()


def _graph(kind: Literal["onnx", "pt2"]) -> Callable[[ExportJob], ReadyExport]:
    def prepare(job: ExportJob) -> ReadyExport:
        _require_one_graph(job.runner)
        runner, inputs = job.simplest, job.options.get("inputs", ())
        signature = exported_signature(runner, job.options.get("example_inputs"))

        def write(path: Path, force: bool) -> None:
            export_model(runner, path, kind, signature, job.evidence, inputs=inputs, force=force)

        return ReadyExport(write)

    return prepare


def _beside_graph(path: Path, inputs: Sequence[str]) -> tuple[str, ...]:
    return (f"{path.name}.data", *companions_of(path, inputs).values())


def _require_one_graph(runner: ModelRunner) -> None:
    if runner.live is not None:
        message = f"{type(runner.compilation.source).__name__} is its own Python between graphs of its layers"
        hint = "save the merged model, or what to_transformers() gives: a file of graphs has no Python"
        raise GraftError("GC149", message, hint=hint)


def _graphs_with_cache(job: ExportJob) -> ReadyExport:
    _require_one_graph(job.runner)
    runner, (certificate, folded) = job.simplest, job.evidence

    def write(path: Path, force: bool) -> None:
        export_cached(runner, path, certificate=certificate, folded=folded, force=force)

    return ReadyExport(write)


def _gguf(job: ExportJob) -> ReadyExport:
    """Prepare the export of a compiled model's LoRAs, or of a whole merged model."""
    runner, dtype = job.runner, job.options.get("dtype", "f32")
    if not isinstance(runner, AdaptedRunner):
        merged = cast(FoldedModel, runner)
        return ReadyExport(lambda path, force: export_merged(merged, path, dtype=dtype, force=force))
    require_values(runner)
    adapter, config = plain_of(deployed(runner).compilation), config_of(runner.compilation.source)
    return ReadyExport(lambda path, force: export_adapter(adapter, config, path, dtype=dtype, force=force))


def _require_server(options: Mapping[str, Any]) -> None:
    if options.get("server") is not None:
        server_of(options["server"])


def _peft(job: ExportJob) -> ReadyExport:
    runner, server = job.runner, job.options.get("server")
    if not isinstance(runner, AdaptedRunner):
        raise GraftError("GC115", "a merged model has no adaptation", hint="export the compiled model it was made from")
    require_values(runner)
    limits = None if server is None else server_of(server)
    compilation = deployed(runner).compilation
    adapter, rank = prepared(compilation), None
    if limits is not None:
        adapter = plain(adapter, compilation)
        rank = require_served(limits, adapter.config, adapter.tensors, max_rank=job.options.get("max_rank"))
    return ReadyExport(
        lambda path, force: export_peft(adapter, path, force=force),
        str(adapter.config["peft_type"]),
        adapter.sites(),
        rank,
        None if limits is None or limits.option is None else f"{limits.option} {rank}",
    )


EXPORTERS: Mapping[str, Exporter] = MappingProxyType(
    {
        "onnx": Exporter(_graph("onnx"), companions=_beside_graph),
        "onnx-generate": Exporter(_graphs_with_cache, replaceable=is_cached),
        "pt2": Exporter(_graph("pt2"), companions=_beside_graph),
        "gguf": Exporter(_gguf),
        "peft": Exporter(_peft, _require_server, folds=False, replaceable=is_peft),
    }
)
"""Every format by its name; the options of each are in `graftc.specs.options.exports`, which does not need torch."""

assert EXPORTERS.keys() == FORMATS.keys()
