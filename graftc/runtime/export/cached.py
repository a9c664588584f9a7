"""Export graphs with a cache as ONNX files for generation, with Optimum's names for files, inputs and outputs.

A decoder becomes one file, ``model.onnx``, for prompts and for all later steps. A model with an encoder becomes three:
``encoder_model.onnx``; ``decoder_model.onnx``, the first step, which computes keys and values from the encoder's
output; and ``decoder_with_past_model.onnx`` for all other steps. The folder also contains the model's config and
generation config.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.past import CACHE, ENCODED, ENCODER, PAST, USE_CACHE, fill_cache, new_cache, read_cache
from graftc.compiler.capture.signature import BATCH, SEQUENCE, TARGET, Axis, size_of
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.past_inputs import is_cross, is_past, past_place
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Signature
from graftc.passes.graph.last_tokens import at_last_tokens
from graftc.runtime.export.exchange import Exchange
from graftc.runtime.export.graph_options import adapter_files
from graftc.runtime.export.graphs import write_inputs
from graftc.runtime.export.job import ExportJob, require_one_graph
from graftc.runtime.export.module import ExportModule
from graftc.runtime.export.onnx import prepare_onnx, save_onnx
from graftc.runtime.export.onnx_check import check_onnx
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.choices import with_choices
from graftc.runtime.model.generation import Generating
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.stand_in import encode
from graftc.runtime.onnx_generation.genai import genai_config
from graftc.runtime.onnx_generation.io_names import DECODER, PAIR, Slot, optimum_name
from graftc.runtime.onnx_generation.prefixed import prefixed
from graftc.runtime.sources.companions import companions_of_model
from graftc.specs.base import Invoked
from graftc.specs.errors.diagnostics import GraftError

_AXES = {BATCH: "batch_size", PAST: "past_sequence_length"}
_HIDDEN = "last_hidden_state"


@dataclass(frozen=True)
class CachedFile:
    """One of the ONNX files.

    Attributes:
        name: the file name.
        present: the call that its graph is for.
        inputs, outputs: functions from names in the graph to names in the file; outputs mapped to None are left out.
        empty: a predicate for graph inputs that the file lacks because they have no tokens.
        last: whether logits are computed for the last token of each row only.
    """

    name: str
    present: Mapping[str, Any]
    inputs: Callable[[str], str]
    outputs: Callable[[str], str | None]
    empty: Callable[[str], bool] = field(default=lambda name: False)
    last: bool = False


class CachedModule(ExportModule):
    """An `ExportModule` for a graph with a cache."""

    def __init__(
        self, runner: ModelRunner, signature: Signature, file: CachedFile, exchange: Exchange | None = None
    ) -> None:
        self._file = file
        super().__init__(runner, signature, exchange, apart=True)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of the file's outputs, in order."""
        return tuple(name for name in super().outputs if self._file.outputs(name) is not None)

    def input_name(self, name: str) -> str:
        """Return an input's name in the file, as the `CachedFile` defines it."""
        return self._file.inputs(name)

    def output_name(self, name: str) -> str:
        """Return an output's name in the file, as the `CachedFile` defines it."""
        return str(self._file.outputs(name))

    def axis_name(self, name: str) -> str:
        """Return Optimum's name for an axis or a sum of axes."""
        return " + ".join(self._axis(part) for part in name.split("+"))

    def _axis(self, name: str) -> str:
        if name in (SEQUENCE, TARGET):
            encoded = name == SEQUENCE and any(TARGET in axis.axes for axis in self.axes)
            return "encoder_sequence_length" if encoded else "sequence_length"
        return _AXES.get(name, name)

    def exported(self, program: Program) -> Program:
        """Return the Program with logits for those tokens that the file has them for."""
        if not self._file.last:
            return program
        tokens = "input_ids" if "input_ids" in program.signature else "decoder_input_ids"
        mask = "attention_mask" if tokens == "input_ids" else "decoder_attention_mask"
        return at_last_tokens(program, "logits", tokens, mask)

    def taken(self, axis: Axis) -> bool:
        """Return whether the file has an input: a node in the graph reads it, and it has tokens."""
        node = next(n for n in self.program.placeholders() if str(n.target) == axis.name)
        read = bool(node.users) and not all(user.op == "output" for user in node.users)
        return not self._file.empty(axis.name) and read

    def filled(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the module's inputs together with empty tensors for those that the file lacks."""
        like = next(value for value in inputs.values() if isinstance(value, Tensor))
        rows = {BATCH: like.shape[0]}
        absent = [spec for spec in self.program.inputs if spec.name not in inputs]
        shapes = ([size_of(n, rows, 0) if isinstance(n, str) else n for n in spec.shape] for spec in absent)
        zeros = {s.name: like.new_zeros(shape, dtype=s.dtype) for s, shape in zip(absent, shapes, strict=True)}
        return {**inputs, **zeros}


def prepare(job: ExportJob) -> dict[str, tuple[CachedModule, Any]]:
    """Return the graphs, each with an ONNX model in memory, by file name.

    Raises:
        GraftError: GC142 for a model that does not generate, GC140 for one without a cache of keys and values, GC141
            for adaptations that a cache cannot hold, or that take effect only after an invocation; GC149 for a model
            that is not one graph; others as in `prepare_onnx`.
    """
    require_one_graph(job.runner)
    for control in job.runner.compilation.controls.values():
        if isinstance(control, Invoked):
            message = f"a graph with a cache needs to be told where {control.name!r} begins, but its users do not know"
            raise GraftError("GC141", message, hint="export format onnx, which reads whole texts, or format gguf")
    runner = job.served
    if isinstance(runner, AdaptedRunner) and job.exchange is None:
        runner = prefixed(runner)
    Generating(runner).require_generating()
    last = job.options["logits"] == "last"
    calls = ((file, signature_for(runner.compilation, file.present)) for file in _files(runner, last))
    modules = {file.name: CachedModule(runner, signature, file, job.exchange) for file, signature in calls}
    job.require_read(*modules.values())
    for module in modules.values():
        _require_any_length(runner, module)
    opset = job.options["opset"]
    return {name: (module, prepare_onnx(module, job.metadata(module), opset)) for name, module in modules.items()}


def _require_any_length(runner: ModelRunner, module: CachedModule) -> None:
    """Raise if the model's own code fixes the number of a call's tokens, so that no graph serves prompts and steps.

    Raises:
        GraftError: GC140.
    """
    for axis in module.axes:
        if axis.name in ("input_ids", "decoder_input_ids") and isinstance(length := axis.axes[1], int):
            message = f"the graph of {type(runner.compilation.model).__name__} takes texts of {length} tokens only"
            hint = "generate in torch, or export format onnx with example_inputs of the wanted length"
            raise GraftError("GC140", message, hint=hint)


def write(job: ExportJob, folder: Path) -> None:
    """Create a folder of ONNX files for generation."""
    runner = job.served
    origin = companions_of_model(runner.compilation.source)
    folder.mkdir()
    config, generation = copy.deepcopy(runner.config), getattr(runner.module, "generation_config", None)
    config.architectures = [type(runner.compilation.model).__name__]
    for name, (module, model) in job.prepared.items():
        save_onnx(model, folder / name)
        _describe(module, config, generation, folder, name)
    write_inputs(job, [module for module, _ in job.prepared.values()], _adapters(job, folder))
    config.save_pretrained(folder)
    if generation is not None:
        generation.save_pretrained(folder)
    for companion in origin:
        if not (folder / companion.name).exists():
            shutil.copyfile(companion, folder / companion.name)


def check(job: ExportJob, folder: Path) -> None:
    """Check every file in the folder with ONNX Runtime.

    Raises:
        GraftError: GC060 if a check fails.
    """
    for name, (module, _) in job.prepared.items():
        files = [file for own, file in _adapters(job, folder).items() if own in module.adaptations]
        check_onnx(module, folder / name, files if len(job.prepared) == 1 else ())


def _adapters(job: ExportJob, folder: Path) -> dict[str, Path]:
    """Return the files with the values of adaptations that are inputs."""
    return {name: folder / file for name, file in adapter_files(job.options, "adapters/").items()}


def _describe(module: CachedModule, config: Any, generation: Any, folder: Path, name: str) -> None:
    """Write a config for onnxruntime-genai beside a graph, if onnxruntime-genai supports such models."""
    inputs = [module.input_name(axis.name) for axis in module.axes]
    outputs = [module.output_name(output) for output in module.outputs]
    if generation is not None and (content := genai_config(config, generation, name, inputs, outputs)) is not None:
        if module.defaults:  # ONNX Runtime warns of every input that has a default
            content["model"]["decoder"]["session_options"]["log_severity_level"] = 3
        (folder / "genai_config.json").write_text(json.dumps(content, indent=4), encoding="utf-8")


def is_exported(path: Path) -> bool:
    """Return whether `write` created a folder, so that it may be replaced."""
    return (path / "config.json").is_file() and any((path / name).is_file() for name in (DECODER, PAIR[0]))


def _files(runner: ModelRunner, last: bool) -> Iterator[CachedFile]:
    """Yield a model's files, in the order in which their graphs are built.

    Args:
        runner: the Runner of the model.
        last: whether logits are computed for the last token of each row only.
    """
    compilation, device = runner.compilation, runner.device
    layout, takes = compilation.cache_layout, runner.interface.parameters
    if not layout.pairs:
        ids = torch.ones(2, 3, dtype=torch.int64, device=device)
        names = [name for name in ("input_ids", "attention_mask", "position_ids") if name in takes]
        yield CachedFile(DECODER, _called(runner, dict.fromkeys(names, ids), {}), _input, _output, last=last)
        return
    main = [axis for axis in compilation.main.axes if not axis.name.startswith("decoder_")]
    text = {axis.name: axis.example(device) for axis in main if axis.name in Generating(runner).encoder_parameters}
    yield CachedFile(PAIR[0], {**text, ENCODER: True}, str, lambda name: name if name == _HIDDEN else None)
    with torch.no_grad():
        encoded = next(iter(encode(runner, dict(text)).values()))
    rows, length = encoded.shape[:2]
    ids = torch.ones(rows, 3, dtype=torch.int64, device=device)
    mask = {name: value for name, value in text.items() if name == "attention_mask" and name in takes}
    start = {"decoder_input_ids": ids, ENCODED: encoded, **mask}
    yield CachedFile(PAIR[1], _called(runner, start, {}), _pair_input, _pair_output, is_past, last)
    past = {
        name: torch.zeros(rows, heads, length if is_cross(name) else 3, width, dtype=dtype, device=device)
        for name, (dtype, heads, width) in layout.heads.items()
    }
    yield CachedFile(PAIR[2], _called(runner, start, past), _pair_input, _text_output, last=last)


def _called(runner: ModelRunner, given: Mapping[str, Any], past: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a call with a cache, in the form used to look up its signature."""
    layout = runner.compilation.cache_layout
    cache = fill_cache(new_cache(layout.pairs), past)
    present = {**given, USE_CACHE: True, CACHE: read_cache(cache, layout, next(iter(given.values())))}
    return with_choices(runner.compilation, present, {})


def _input(name: str) -> str:
    return optimum_name(_slot(name), "past_key_values") if is_past(name) else name


def _output(name: str) -> str | None:
    last = name.rpartition(".")[2]
    if is_past(last):
        return optimum_name(_slot(last), "present")
    return name if name == "logits" else None


_PAIRED = {
    "decoder_input_ids": "input_ids",
    "attention_mask": "encoder_attention_mask",
    ENCODED: "encoder_hidden_states",
}


def _pair_input(name: str) -> str:
    return optimum_name(_slot(name), "past_key_values", seq2seq=True) if is_past(name) else _PAIRED.get(name, name)


def _pair_output(name: str) -> str | None:
    last = name.rpartition(".")[2]
    return optimum_name(_slot(last), "present", seq2seq=True) if is_past(last) else _output(name)


def _text_output(name: str) -> str | None:
    """Return an output's name in a step without the encoder's keys and values; None if the output is one of these."""
    return None if is_cross(name.rpartition(".")[2]) else _pair_output(name)


def _slot(name: str) -> Slot:
    _, layer, part = past_place(name)
    return Slot(layer, "cross" if is_cross(name) else "self", "key" if part == "key" else "value")
