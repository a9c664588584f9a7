"""Export to ONNX through transformers' exporter, with its graph fixes; check with ``onnx.checker`` and ONNX Runtime."""

from __future__ import annotations

import functools
import importlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.quiet import quiet
from graftc.runtime.export.graphs import beside, write_inputs
from graftc.runtime.export.job import ExportJob
from graftc.runtime.export.module import ExportModule
from graftc.runtime.export.onnx_check import check_onnx, package
from graftc.runtime.export.onnx_packed import PACKED_OPSET, lower_packed
from graftc.specs.errors.diagnostics import GraftError, first_line

_LIBRARIES = ("torch", "transformers", "onnx_ir", "onnxscript")
"""Libraries that log messages and issue warnings about their own internals."""

LARGE = 64 * 2**20
"""Weights with more bytes than this in total go into a separate file."""


def prepare(job: ExportJob) -> Any:
    """Return a model's graph as an ONNX model in memory.

    Raises:
        GraftError: as in `ExportJob.graph` and `prepare_onnx`.
    """
    module = job.graph(apart=True)
    return prepare_onnx(module, job.metadata(module), job.options["opset"])


def write(job: ExportJob, path: Path) -> None:
    """Write a model's graph and, beside it, the tensors of adaptations that are inputs."""
    save_onnx(job.prepared, path)
    write_inputs(job, [job.graph(apart=True)], beside(job, path))


def check(job: ExportJob, path: Path) -> None:
    """Check the files that `write` wrote; see `check_onnx`."""
    check_onnx(job.graph(apart=True), path, beside(job, path).values())


def prepare_onnx(module: ExportModule, metadata: Mapping[str, str], opset: int) -> Any:
    """Return an in-memory ONNX model with the model's own input and output names and named dynamic axes.

    Args:
        module: what the graph computes.
        metadata: entries for the model's metadata.
        opset: the version of the ONNX operators.

    Raises:
        GraftError: GC060 if exporting fails, GC061 without the ``export`` extra, GC073 for packed weights in an opset
            without operators for them.
    """
    if module.packed and opset < PACKED_OPSET:
        message = f"opset is {opset}, which has no operators for packed weights"
        raise GraftError("GC073", message, hint=f"use an opset from {PACKED_OPSET} on, or export in full precision")
    _, _, ir = package("onnx"), package("onnxruntime"), package("onnx_ir")
    try:
        with exclusive(), quiet(_LIBRARIES), _not_verbose(), torch.no_grad():
            exporters: Any = importlib.import_module("transformers.exporters")
            shapes = module.dynamic_shapes()
            config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=shapes, opset_version=opset)
            exported = exporters.OnnxExporter().export(module.module, dict(module.inputs), config=config)
    except Exception as error:
        hint = "try an older opset: opset=20" if opset > 20 and not module.packed else None
        raise GraftError("GC060", f"the ONNX exporter failed: {first_line(_origin(error))}", hint=hint) from error
    # Before 5.23, transformers returns torch's ONNXProgram, which contains the model.
    model = exported.program if hasattr(exported, "program") else exported.model
    _name_tensors(ir, model, module)
    _name_axes(ir, model, module)
    _expand_rotations(ir, model)
    lower_packed(model, module.packed)
    for node in model.graph.all_nodes():
        # Stack traces contain this machine's paths, and make up half of a small file.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    model.metadata_props.update(metadata)
    model.producer_name = "graftc"
    return model


def _origin(error: BaseException) -> BaseException:
    """Return the error that others were raised from, which tells more than the summary of the exporter."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def save_onnx(model: Any, path: Path) -> None:
    """Write an ONNX model, with large weights in a separate file."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = {"external_data": f"{path.name}.data"} if size > LARGE else {}
    package("onnx_ir").save(model, str(path), **beside)


@contextmanager
def _not_verbose() -> Iterator[None]:
    """Turn off the progress output of torch's exporter while the block runs; transformers has no option for this.

    stdout is not redirected, since it belongs to the whole process, whose other threads may print to or redirect it in
    the meantime.
    """
    before = torch.onnx.export
    torch.onnx.export = functools.partial(before, verbose=False)
    try:
        yield
    finally:
        torch.onnx.export = before


def _name_tensors(ir: Any, model: Any, module: ExportModule) -> None:
    """Name inputs and outputs; inputs that are adaptations' tensors get their full names and their defaults."""
    for value in [*model.graph.inputs, *model.graph.outputs]:
        renamed = module.input_name if value in model.graph.inputs else module.output_name
        value.name = renamed(value.name)
    inputs = list(model.graph.inputs)
    for value, name in zip(inputs[len(module.axes) :], module.tensors, strict=True):
        value.name = name
        if (default := module.defaults.get(name)) is not None:
            value.const_value = ir.tensor(default.cpu().numpy(), name=name)
            model.graph.register_initializer(value)


def _name_axes(ir: Any, model: Any, module: ExportModule) -> None:
    """Name the dynamic axes of inputs and outputs."""
    names: dict[str, str] = {}
    for value, axis in zip(model.graph.inputs, [*module.axes, *module.tensor_axes], strict=False):
        for dim, size in zip(value.shape, axis.axes, strict=True):
            if isinstance(size, str) and not isinstance(dim, int):
                names[str(dim.value)] = module.axis_name(size)
            elif isinstance(size, str) and axis in module.tensor_axes:
                raise GraftError("GC060", f"the exporter fixed the size {size!r} of {axis.name}")
    for value in [*model.graph.inputs, *model.graph.outputs]:
        if value.shape is not None:
            dims = [d if isinstance(d, int) else ir.SymbolicDim(_named(names, d.value)) for d in value.shape]
            value.shape = ir.Shape(dims)


def _expand_rotations(ir: Any, model: Any) -> None:
    """Expand the cosines and sines of rotations to the rows of their inputs, in place.

    From opset 23 on, onnxscript replaces rotations by ``RotaryEmbedding``, whose cosines and sines need a row for each
    row of the batch. It leaves them as they were, and many models compute one row for all.
    """
    if not any(map(_is_rotation, model.graph)):
        return
    # Every rotation computes its own cosines, which are the same in all layers.
    importlib.import_module("onnx_ir.passes.common").CommonSubexpressionEliminationPass()(model)
    expanded: dict[Any, Any] = {}
    for node in [node for node in model.graph if _is_rotation(node)]:
        values = node.inputs[0]
        for place in (1, 2):
            numbers = node.inputs[place]
            if numbers not in expanded:
                expanded[numbers] = _expanded_rows(ir, model.graph, node, numbers, values)
            node.replace_input_with(place, expanded[numbers])


def _is_rotation(node: Any) -> bool:
    """Return whether a node rotates by cosines and sines, as opposed to positions that index tables of them."""
    return node.op_type == "RotaryEmbedding" and len(node.inputs) == 3


def _expanded_rows(ir: Any, graph: Any, before: Any, numbers: Any, values: Any) -> Any:
    """Return cosines or sines ``[1 or batch, tokens, width]`` with a row for each row of some values."""
    if _first_size(numbers) is not None and _first_size(numbers) == _first_size(values):
        return numbers
    name = f"{numbers.name}_rows"
    ones = ir.tensor([1, 1], dtype=ir.DataType.INT64, name=f"{name}_ones")
    one = ir.Value(name=ones.name, shape=ones.shape, type=ir.TensorType(ones.dtype), const_value=ones)
    graph.register_initializer(one)
    rows = ir.node("Shape", [values], {"start": 0, "end": 1})
    sizes = ir.node("Concat", [rows.outputs[0], one], {"axis": 0})
    node = ir.node("Expand", [numbers, sizes.outputs[0]])
    node.outputs[0].name, node.outputs[0].type = name, numbers.type
    if numbers.shape is not None and values.shape is not None:
        node.outputs[0].shape = ir.Shape([values.shape[0], *numbers.shape[1:]])
    graph.insert_before(before, [rows, sizes, node])
    return node.outputs[0]


def _first_size(value: Any) -> int | str | None:
    """Return the size of a value's first axis, or its name; None if neither is known."""
    size = None if value.shape is None else value.shape[0]
    return size if size is None or isinstance(size, int) else size.value


def _named(names: Mapping[str, str], size: Any) -> Any:
    """Return a size with its symbols replaced by axis names; it may be a sum of symbols."""
    return size if size is None else re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(size))
