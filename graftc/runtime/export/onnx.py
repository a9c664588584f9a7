"""Export to ONNX through transformers' exporter, with its graph fixes; check with ``onnx.checker`` and ONNX Runtime."""

from __future__ import annotations

import functools
import importlib
import math
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import PAST
from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.compiler.quiet import quiet
from graftc.passes.core.ir.past_inputs import is_past
from graftc.runtime.export.graphs import beside, write_inputs
from graftc.runtime.export.job import ExportJob
from graftc.runtime.export.module import ExportModule
from graftc.runtime.export.onnx_packed import OPSET, lower_packed
from graftc.runtime.onnx_generation.adapter_files import SUFFIX
from graftc.specs.errors.diagnostics import GraftError, first_line

TOLERANCE = 1e-4
"""The largest allowed difference of a float32 export from torch, relative to the largest output, or to 1 if greater."""

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
    return prepare_onnx(module, job.metadata(module))


def write(job: ExportJob, path: Path) -> None:
    """Write a model's graph and, beside it, the tensors of adaptations that are inputs."""
    save_onnx(job.prepared, path)
    write_inputs(job, [job.graph(apart=True)], beside(job, path))


def check(job: ExportJob, path: Path) -> None:
    """Check the files that `write` wrote; see `check_onnx`."""
    check_onnx(job.graph(apart=True), path, beside(job, path).values())


def prepare_onnx(module: ExportModule, metadata: Mapping[str, str]) -> Any:
    """Return an in-memory ONNX model with the model's own input and output names and named dynamic axes.

    Raises:
        GraftError: GC060 if exporting fails, GC061 without the ``export`` extra.
    """
    _, _, ir = package("onnx"), package("onnxruntime"), package("onnx_ir")
    try:
        with exclusive(), quiet(_LIBRARIES), _not_verbose(), torch.no_grad():
            exporters: Any = importlib.import_module("transformers.exporters")
            own = {"opset_version": OPSET} if module.packed else {}
            config = exporters.OnnxConfig(dynamic=True, dynamic_shapes=module.dynamic_shapes(), **own)
            exported = exporters.OnnxExporter().export(module.module, dict(module.inputs), config=config)
    except Exception as error:
        raise GraftError("GC060", f"the ONNX exporter failed: {first_line(error)}") from error
    model = exported.program
    _name_tensors(ir, model, module)
    _name_axes(ir, model, module)
    lower_packed(model, module.packed)
    for node in model.graph.all_nodes():
        # Stack traces contain this machine's paths, and make up half of a small file.
        node.metadata_props.pop("pkg.torch.onnx.stack_trace", None)
    model.metadata_props.update(metadata)
    model.producer_name = "graftc"
    return model


def save_onnx(model: Any, path: Path) -> None:
    """Write an ONNX model, with large weights in a separate file."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    beside = {"external_data": f"{path.name}.data"} if size > LARGE else {}
    package("onnx_ir").save(model, str(path), **beside)


def check_onnx(module: ExportModule, path: Path, adapters: Iterable[Path] = ()) -> None:
    """Check a file with ``onnx.checker``, and compare its results in ONNX Runtime with torch's.

    Args:
        module: what the graph computes.
        path: the file.
        adapters: files with the inputs' values; those that ONNX Runtime reads are used for a call.

    Raises:
        GraftError: GC060 if a check fails.
    """
    try:
        package("onnx").checker.check_model(str(path))
    except Exception as error:
        raise GraftError("GC060", f"onnx.checker rejects the export: {first_line(error)}") from error
    try:
        _compare(module, path, [file for file in adapters if file.suffix == SUFFIX])
    except GraftError:
        raise
    except Exception as error:
        raise _no_kernel(module, error) from error


def _no_kernel(module: ExportModule, error: Exception) -> GraftError:
    """Return the error for a file that ONNX Runtime cannot run."""
    message = f"ONNX Runtime cannot run the export: {first_line(error)}"
    dtypes = {tensor.dtype for tensor in module.module.state_dict().values()}
    hint = "export to .pt2, or load the base in float32 or float16: ONNX Runtime has no bfloat16 on CPUs"
    return GraftError("GC060", message, hint=hint if torch.bfloat16 in dtypes else None)


def package(name: str) -> Any:
    """Return a package of the extra ``export``.

    Raises:
        GraftError: GC061 if it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise GraftError(
            "GC061", f"exporting to ONNX needs the package {name}", hint="pip install 'graftc[export]'"
        ) from error


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


def _named(names: Mapping[str, str], size: Any) -> Any:
    """Return a size with its symbols replaced by axis names; it may be a sum of symbols."""
    return size if size is None else re.sub(r"\w+", lambda found: names.get(found[0], found[0]), str(size))


@torch.no_grad()
def _compare(module: ExportModule, path: Path, adapters: Sequence[Path]) -> None:
    """Compare the outputs of ONNX Runtime, which first optimises the file, with torch's, at sizes not yet captured."""
    session = session_of(path)
    samples = [module.sample(seed, sizes) for seed, sizes in enumerate(((2, 5), (1, 4)))]
    if any(is_past(axis.name) for axis in module.axes):
        tokens = next(axis.axes[1] for axis in module.axes if axis.name.endswith("input_ids"))
        samples += [module.sample(2, (2, 5), {PAST: 0}), module.sample(3, (2, 5), {str(tokens): 1})]
    for inputs in samples:
        _require_as_torch(session, module, inputs, module.module(**inputs))
    if module.defaults:
        expected = module.without_adapters(samples[0])
        _require_as_torch(session, module, samples[0], expected, omitted=module.defaults)
    if adapters:
        expected = module.module(**samples[0])
        _require_as_torch(session, module, samples[0], expected, omitted=module.tensors, adapters=adapters)


def session_of(path: Path) -> Any:
    """Return a session of ONNX Runtime for a file, without its warning of every input that has a default."""
    ort = package("onnxruntime")
    options = ort.SessionOptions()
    options.log_severity_level = 3
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run_session(
    session: Any, names: Sequence[str], inputs: Mapping[str, Tensor], adapters: Iterable[Path] = ()
) -> dict[str, Tensor]:
    """Return outputs of a session by name, with the adapters in some files active."""
    ort = package("onnxruntime")
    options, active = ort.RunOptions(), []
    for file in adapters:
        active.append(ort.LoraAdapter())  # it must exist until the call returns
        active[-1].Load(str(file))
        options.add_active_adapter(active[-1])
    values = session.run(list(names), {name: value.cpu().numpy() for name, value in inputs.items()}, options)
    return dict(zip(names, map(torch.from_numpy, values), strict=True))


def _require_as_torch(
    session: Any,
    module: ExportModule,
    inputs: Mapping[str, Any],
    expected: Mapping[str, Tensor],
    omitted: Collection[str] = (),
    adapters: Sequence[Path] = (),
) -> None:
    feed = {module.input_name(name): value for name, value in module.flat(inputs).items() if name not in omitted}
    outputs = {module.output_name(name): expected[name] for name in module.outputs}
    require_close(run_session(session, list(outputs), feed, adapters), outputs, module.counting(feed))


def compare(
    path: Path, inputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], counting: Tensor | None = None
) -> None:
    """Compare a file's outputs in ONNX Runtime with a model's on the same inputs.

    Args:
        path: the file.
        inputs, expected: inputs and expected outputs, by their names in the file.
        counting: the positions to compare, as in `ExportModule.counting`.

    Raises:
        GraftError: GC060 if the outputs differ.
    """
    session = session_of(path)
    known = {value.name for value in session.get_inputs()}
    feed = {name: value for name, value in inputs.items() if name in known}
    require_close(run_session(session, list(expected), feed), expected, counting)


def require_close(outputs: Mapping[str, Tensor], expected: Mapping[str, Tensor], counting: Tensor | None) -> None:
    """Compare outputs of ONNX Runtime with torch's.

    Args:
        outputs, expected: outputs and expected outputs, by name.
        counting: the positions to compare, as in `ExportModule.counting`.

    Raises:
        GraftError: GC060 if they differ.
    """
    for name, wanted in expected.items():
        reference, result = wanted.cpu(), outputs[name].cpu()
        if counting is not None and reference.shape[: counting.dim()] == counting.shape:
            reference, result = reference[counting.cpu()], result[counting.cpu()]
        if reference.numel() and not bool(reference.isfinite().any()):
            hint = "look for NaN in trained tensors and in the base's buffers"
            raise GraftError("GC060", f"{name} is not finite in torch, so nothing can be compared", hint=hint)
        difference = largest_difference(reference, result)
        if not difference <= _bound(wanted.dtype) * max(1.0, largest_number(reference)):
            beyond = f"by {difference:.2e}, more than {_bound(wanted.dtype):.0e}"
            how = beyond if math.isfinite(difference) else "in which values are finite"
            raise GraftError("GC060", f"ONNX Runtime's {name} differs from torch {how}")


def _bound(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype in (torch.float32, torch.float64) else 0.05
