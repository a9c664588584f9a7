"""Check ONNX files: ``onnx.checker`` reads them, and ONNX Runtime computes what torch does, but for rounding."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.past import PAST
from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.compiler.folding.rounding import rounded_differently
from graftc.passes.core.ir.past_inputs import is_past
from graftc.runtime.export.module import ExportModule
from graftc.runtime.onnx_generation.adapter_files import SUFFIX
from graftc.specs.errors.diagnostics import GraftError, first_line
from graftc.specs.errors.packages import optional_package

TOLERANCE = 1e-4
"""The largest allowed difference of a float32 export from torch, relative to the largest output, or to 1 if greater.

A larger one is allowed if rounding the weights differently changes torch's own outputs by half of it."""

_MOST_NOISE = 0.01
"""The largest difference that rounding may explain, relative to the largest output."""
TIMES = 8
"""The number of roundings that are tried."""


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
    return optional_package(name, "exporting to ONNX", "export")


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
    rounded = ({module.output_name(n): t for n, t in own.items()} for own in rounded_outputs(module, inputs))
    require_close(run_session(session, list(outputs), feed, adapters), outputs, module.counting(feed), rounded)


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


def require_close(
    outputs: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    counting: Tensor | None,
    rounded: Iterable[Mapping[str, Tensor]] = (),
) -> None:
    """Compare outputs of ONNX Runtime with torch's.

    Args:
        outputs, expected: outputs and expected outputs, by name.
        counting: the positions to compare, as in `ExportModule.counting`.
        rounded: torch's outputs with weights rounded differently, which are computed only if a difference is large.

    Raises:
        GraftError: GC060 if they differ by more than rounding explains.
    """
    noise = _Noise(expected, counting, rounded)
    for name, wanted in expected.items():
        reference, result = (_counted(value.cpu(), counting) for value in (wanted, outputs[name]))
        if reference.numel() and not bool(reference.isfinite().any()):
            hint = "look for NaN in trained tensors and in the base's buffers"
            raise GraftError("GC060", f"{name} is not finite in torch, so nothing can be compared", hint=hint)
        difference, largest = largest_difference(reference, result), largest_number(reference)
        bound = _bound(wanted.dtype) * max(1.0, largest)
        if difference <= bound:
            continue
        if not math.isfinite(difference):
            message = f"the output {name} of ONNX Runtime and torch's differ in which values are finite"
            raise GraftError("GC060", message)
        bound = max(bound, min(noise.bound(name, difference), _MOST_NOISE * largest))
        if difference > bound:
            message = (
                f"the output {name} of ONNX Runtime differs from torch's by {difference:.2e}, more than {bound:.2e}"
            )
            raise GraftError("GC060", message)


class _Noise:
    """The effect of rounding weights differently on outputs in torch, computed as far as it is needed."""

    def __init__(
        self, expected: Mapping[str, Tensor], counting: Tensor | None, rounded: Iterable[Mapping[str, Tensor]]
    ) -> None:
        self._expected, self._counting, self._rounded = expected, counting, iter(rounded)
        self._largest = dict.fromkeys(expected, 0.0)

    def bound(self, name: str, difference: float) -> float:
        """Return twice the largest effect on an output, over as many roundings as explain a difference."""
        while 2 * self._largest[name] < difference and (outputs := next(self._rounded, None)) is not None:
            for own, wanted in self._expected.items():
                pair = (_counted(value.cpu(), self._counting) for value in (wanted, outputs[own]))
                self._largest[own] = max(self._largest[own], largest_difference(*pair))
        return 2 * self._largest[name]


def _counted(value: Tensor, counting: Tensor | None) -> Tensor:
    """Return the positions of an output that are compared."""
    if counting is None or value.shape[: counting.dim()] != counting.shape:
        return value
    return value[counting.cpu()]


def _bound(dtype: torch.dtype) -> float:
    return TOLERANCE if dtype in (torch.float32, torch.float64) else 0.05


@torch.no_grad()
def rounded_outputs(module: ExportModule, inputs: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Yield a module's outputs by name, each time with its weights rounded in another way.

    The module's own tensors stay as they are; a copy of them is made each time, by `rounded_differently`.

    Args:
        module: the module.
        inputs: its inputs.
    """
    every = (*module.module.named_parameters(), *module.module.named_buffers())
    weights = {name: own for name, own in every if own.is_floating_point()}
    for seed in range(TIMES):
        generator = torch.Generator().manual_seed(seed)
        changed = {name: rounded_differently(own, generator) for name, own in weights.items()}
        yield torch.func.functional_call(module.module, changed, kwargs=dict(inputs))
