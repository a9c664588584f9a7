"""Export a compiled or merged model in any format."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.capture.isolation import isolated
from graftc.compiler.resolve.slots import slot_count
from graftc.files.writing import check_destination, staged
from graftc.runtime.export.exporter import Exporter
from graftc.runtime.export.formats.gguf import FileType
from graftc.runtime.export.job import AdapterSummary, ExportJob
from graftc.runtime.export.metadata import UNFOLDED, FoldEvidence
from graftc.runtime.export.options import options_for
from graftc.runtime.export.registry import exporter_of
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.runner import runner_of
from graftc.runtime.model.sharded import written_once
from graftc.runtime.progress import during
from graftc.specs.errors.arguments import absolute_path, as_path
from graftc.specs.errors.text import listed


@dataclass(frozen=True)
class ReadyExport:
    """An export that has passed every check that can run before files are written.

    Attributes:
        exporter: the format's exporter.
        job: the model to export, with its options.
    """

    exporter: Exporter
    job: ExportJob

    @property
    def adapters(self) -> AdapterSummary:
        """The summary of adapters that are written on their own; empty for other exports."""
        return self.job.prepared if isinstance(self.job.prepared, AdapterSummary) else AdapterSummary()

    def write(self, *, force: bool) -> None:
        """Write the export to the job's path, and check it.

        Raises:
            GraftError: GC063 if the path exists and may not be replaced, GC064 if it cannot be written, or an error
                from the exporter.
        """
        exporter, job, path = self.exporter, self.job, self.job.path
        assert path is not None
        with exporter.reported():
            companions = exporter.companions(path, job.options)
            with staged(path, force=force, companions=companions, replaceable=exporter.replaceable) as file:
                exporter.write(job, file)
                if fault := _fault_of(file, companions):
                    raise exporter.failed(fault)
                exporter.check(job, file)


def _fault_of(file: Path, companions: Sequence[str]) -> str:
    """Return what is wrong with the result of a write, apart from its content; empty if nothing is."""
    if not os.path.lexists(file):
        return "it wrote nothing"
    if file.is_symlink() or not (file.is_file() or file.is_dir()):
        return "it wrote neither a file nor a folder"
    undeclared = {other.name for other in file.parent.iterdir()} - {file.name, *companions}
    return f"it wrote {listed(sorted(undeclared))} beside its file, but declares no such file" if undeclared else ""


class Exporting:
    """The operation that exports a model.

    Args:
        runner: the Runner of the model.
        evidence: the evidence for a fold, to include in the files.
    """

    evidence = UNFOLDED

    def __init__(self, runner: ModelRunner, evidence: FoldEvidence | None = None) -> None:
        self.runner = runner
        if evidence is not None:
            self.evidence = evidence

    @isolated()
    @during("exporting")
    @written_once  # type: ignore[arg-type]  # ``options`` never has a path
    def export(
        self,
        path: str | Path,
        format: str = "onnx",
        example_inputs: ExampleInputs | None = None,
        *,
        inputs: str | Sequence[str] = (),
        dtype: FileType | None = None,
        server: str | None = None,
        max_rank: int | None = None,
        force: bool = False,
        **options: Any,
    ) -> Path:
        """Export the model in eval mode.

        A compiled model is exported with its adapters, with AdaMix experts averaged; a merged one is exported folded,
        with its certificate in the metadata. ``"peft"`` writes the adapters of a compiled model as a folder that PEFT
        loads. ``"gguf"`` writes a merged model for llama.cpp, or the LoRAs of a compiled one as an adapter for it.
        ``"onnx-generate"`` writes a folder of graphs with a cache, for generation with ONNX Runtime. ``"onnx-adapter"``
        writes the adapters of a compiled model for a graph that takes adapters as inputs.

        The file contains every adaptation, including disabled ones. Graphs take no labels and return no loss.

        The tensors of adaptations in ``inputs`` become inputs of the graph, by their full names, instead of constants.
        Ranks, widths of bottlenecks and lengths of prefixes are then free, and scales are part of the values, so that
        one file serves adapters of any size; ONNX files have defaults with which they compute the base. In ``.pt2`` the
        tensors form one keyword argument, ``adapter_tensors``, a mapping from names to tensors. The model's own values
        are stored beside the file, in ``<file>.<adaptation>.safetensors``, or within the folder of ``onnx-generate`` in
        ``adapters/<adaptation>.safetensors``.

        Args:
            path: the file or folder to write.
            format: ``"onnx"``, ``"onnx-generate"``, ``"onnx-adapter"``, ``"pt2"``, ``"peft"``, ``"gguf"``, or a format
                that an installed package adds.
            example_inputs: for onnx and pt2, a call whose signature is exported, by name or in order; by default the
                call that the model was compiled with. Tensors' values do not matter.
            inputs: for onnx, onnx-generate and pt2, names of adaptations in the graph whose tensors become inputs.
            dtype: the element type of the matrices in a GGUF file: ``"f32"``, ``"f16"`` or ``"bf16"``; by default the
                one that the server needs, or ``"f32"``.
            server: the serving engine that must be able to load the PEFT folder or the GGUF file. In a folder, the
                update is plain LoRA, scaled by ``alpha / rank`` and relative to the unchanged base: at twice the rank
                if factors were initialised from the weights.
            max_rank: the maximum rank with which the server was started; by default, the largest that it supports.
            force: whether to replace an existing file or folder.
            options: for onnx and onnx-generate ``adapter_format``: ``"safetensors"`` by default, or ``"onnx_adapter"``;
                for onnx-adapter ``graph``, the ONNX file or folder that the adapter is for, and optionally ``slot``,
                the graph's adaptation in whose place it goes; options of a format that an installed package adds.

        Raises:
            GraftError: GC031 for example inputs that have no graph, GC060 for an unknown format, or if the exporter or
                the check of its result fails, GC061 without the ``export`` extra, GC063 if ``path`` exists, GC064 if it
                cannot be written, GC065 for an adaptation in ``inputs`` that the graph does not read, GC073 for an
                option that the format does not have, GC078 if a package's exporter fails, GC192 for adapters that do
                not fit ``graph``, GC091 for an adaptation in ``inputs`` that does not exist; before anything is
                written, GC115 for a model that PEFT cannot express, GC066 for anything but LoRA in a GGUF adapter, and
                GC068 for anything that the server does not accept.
        """
        to, given = as_path(path), {**options, "example_inputs": example_inputs, "inputs": inputs, "dtype": dtype}
        given |= {"server": server, "max_rank": max_rank}
        ready_export(self, exporter_of(format), given, to, force=force).write(force=force)
        return to


def ready_export(
    exporting: Exporting, exporter: Exporter, given: Mapping[str, Any], path: Path | None, *, force: bool = False
) -> ReadyExport:
    """Prepare an export of every adaptation, including disabled ones, without writing it.

    Args:
        exporting: the model's export operation.
        exporter: the format's exporter.
        given: the format's options, by name.
        path: where to write it; None to only prepare it.
        force: whether to replace an existing file or folder.

    Raises:
        GraftError: for an option or a model that the format does not support; GC063 if the path exists and may not be
            replaced.
    """
    options = exporter.defaults | options_for(exporter, given)
    job = ExportJob(_at_rest(exporting.runner).complete(), options, exporting.evidence, path)
    with exporter.reported():
        if path is not None:  # preparing may take minutes
            companions = exporter.companions(path, options)
            check_destination(absolute_path(path), force=force, companions=companions, replaceable=exporter.replaceable)
        job.prepared = exporter.prepare(job)
    return ReadyExport(exporter, job)


def _at_rest(runner: ModelRunner) -> ModelRunner:
    """Return a model whose tensors no other thread changes: a copy over the same base if it has slots."""
    if not any(slot_count(composition) for composition in runner.compilation.spec.compose):
        return runner
    base: dict[int, Any] = {id(tensor): tensor for _, tensor in runner.store.base()}
    still: ModelRunner = runner_of(copy.deepcopy(runner.module, base))
    return still
