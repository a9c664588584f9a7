"""Create errors for failed captures, which distinguish rejected inputs from code that cannot be traced."""

from __future__ import annotations

import inspect
import logging
import os
import traceback
from collections.abc import Hashable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode, ShapeEnv

from graftc.compat.fake_tensors import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from graftc.compiler.capture.interface import has_values
from graftc.compiler.capture.parameter_uses import ParameterUses, observed
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.quiet import quiet
from graftc.passes.core.ir.meta_calls import mixed_product
from graftc.passes.core.ir.shapes import DTYPE_NAMES
from graftc.specs.errors.diagnostics import GraftError, first_line

_OURS = tuple(f"{folder}{os.sep}" for folder in (Path(torch.__file__).parent, Path(__file__).parents[2]))
_PYTHON = f"{Path(os.__file__).parent}{os.sep}"


class MixedProductError(TypeError):
    """Raised for a product of operands with different dtypes, which kernels reject but the tracer accepts."""


def not_captured(request: CaptureRequest, inputs: Mapping[str, Tensor], error: Exception) -> GraftError:
    """Return the error for a failed capture; must be called while the model is in its capture state.

    Args:
        request: the request; its model runs once on the inputs, unless they are on the meta device.
        inputs: the examples that were used for the capture.
        error: the error that the tracer raised.
    """
    name, called = type(request.model).__name__, str(request)
    own = None if isinstance(error, _OF_TRACERS) else _own_error(request, inputs)
    if isinstance(own, GraftError):  # one of graftc's own ``forward`` methods explains what is missing
        return own
    if own is not None and (type(own) is type(error) or isinstance(error, MixedProductError)):
        shown = ", ".join(_shown(axis) for axis in request.axes)
        with_what = f": it was run with {shown}" if shown else ""
        message = f"{name} does not run with {called}: {first_line(own)}"
        return GraftError("GC030", message, hint=f"the model itself raises this{with_what}")
    place = _place(error)
    return GraftError(
        "GC030",
        f"{name} cannot be captured with {called}: {first_line(error)}" + (f", at {place}" if place else ""),
        hint="torch.export must be able to trace the model; value-dependent Python control flow cannot be",
    )


class UntraceableError(Exception):
    """Raised for a trace that fails regardless of the sizes and of how layers are traced."""

    def __init__(self, error: Exception) -> None:
        super().__init__(*error.args)
        self.__cause__ = error


_OF_TRACERS = (
    GuardOnDataDependentSymNode,
    DataDependentOutputException,
    DynamicOutputShapeException,
    UntraceableError,
)
"""Errors that tracers raise when Python asks for a value; models never raise them."""


def in_any_trace(request: CaptureRequest, inputs: Mapping[str, Tensor], error: Exception) -> bool:
    """Return whether a trace failed for a reason that depends neither on the sizes nor on how layers are traced.

    Either the model asks for values, or it runs without a tracer but fails at the same line on fake tensors of exactly
    these sizes.

    Args:
        request, inputs: as for `not_captured`.
        error: the error that the tracer raised.
    """
    if by_values(error):
        return True
    model, place = request.model, _place(error)
    if not place or not has_values(model) or any(tensor.is_meta for tensor in inputs.values()):
        return False
    mode = FakeTensorMode(shape_env=ShapeEnv(), static_shapes=True, allow_non_fake_inputs=True)
    try:
        with quiet(["torch"], logging.CRITICAL), torch.random.fork_rng([]), mode:
            tensors = dict([*model.named_parameters(), *model.named_buffers()])
            fake: dict[str, Tensor] = {name: mode.from_tensor(tensor) for name, tensor in tensors.items()}
            torch.func.functional_call(model, fake, (), {name: mode.from_tensor(t) for name, t in inputs.items()})
    except Exception as again:
        same = type(again) is type(error) and _place(again) == place
        return same and _own_error(request, inputs) is None
    return False


def by_values(error: BaseException | None) -> bool:
    """Return whether an error shows that the trace fails regardless of the sizes and of how layers are traced."""
    return any(isinstance(each, _OF_TRACERS) for each in _with_causes(error))


def _with_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and the errors that led to it, each once: a chain may be a circle."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def told(error: BaseException) -> str:
    """Return the first line of a failed trace's error, with the place in the model's code."""
    if isinstance(error, GraftError):
        return error.message
    place = _place(error)
    return first_line(error) + (f", at {place}" if place and place not in str(error) else "")


def place_now() -> str:
    """Return the place in the model's code from which this is called; empty if there is none."""
    return next(_places(traceback.walk_stack(inspect.currentframe())), "")


def _places(frames: Iterable[tuple[FrameType, int]]) -> Iterator[str]:
    """Yield the places of frames that are in the model's code."""
    for frame, line in frames:
        if of_the_model(frame.f_code.co_filename):
            yield f"{frame.f_code.co_filename}:{line} in {frame.f_code.co_name}"


def of_the_model(file: str) -> bool:
    """Return whether a source file belongs to neither Python, torch nor graftc."""
    return not file.startswith(("<", *_OURS)) and ("site-packages" in file or not file.startswith(_PYTHON))


def _place(error: BaseException) -> str:
    """Return where in the model's code a trace failed: the innermost line that belongs to neither torch nor graftc."""
    for each in _with_causes(error):
        places = list(_places(traceback.walk_tb(each.__traceback__)))
        if places:
            return places[-1]
    return ""


_OWN_ERRORS: ContextVar[dict[Hashable, Exception | None] | None] = ContextVar(
    "what a model itself raises", default=None
)


@contextmanager
def own_errors_once() -> Iterator[None]:
    """Determine at most once per block what a model itself raises, however many captures with the same inputs fail."""
    token = _OWN_ERRORS.set({})
    try:
        yield
    finally:
        _OWN_ERRORS.reset(token)


def _own_error(request: CaptureRequest, inputs: Mapping[str, Tensor]) -> Exception | None:
    """Return the error that the model itself raises; None if it runs, or cannot be run."""
    known = _OWN_ERRORS.get()
    key = (request.mode, request.flags, *((name, tensor.shape, tensor.dtype) for name, tensor in inputs.items()))
    if known is None:
        return _run_once(request.model, inputs)
    if key not in known:
        known[key] = _run_once(request.model, inputs)
    return known[key]


def _run_once(model: nn.Module, inputs: Mapping[str, Tensor]) -> Exception | None:
    """Run the model on a copy of the inputs, and return the error that it raises, or None."""
    tensors = [*model.parameters(), *model.buffers(), *inputs.values()]
    if any(tensor.is_meta for tensor in tensors):
        return None
    buffers = {path: buffer.clone() for path, buffer in model.named_buffers()}
    devices = list(dict.fromkeys(tensor.device for tensor in tensors if tensor.is_cuda))
    try:
        with torch.random.fork_rng(devices), torch.no_grad(), observed(ParameterUses(model)):
            torch.func.functional_call(model, buffers, (), {name: tensor.clone() for name, tensor in inputs.items()})
    except Exception as error:
        return error
    return None


def _shown(axis: Axis) -> str:
    return f"{axis.name} {DTYPE_NAMES.get(axis.dtype, str(axis.dtype))}{list(axis.sizes)}"


def require_products(graph: fx.Graph) -> None:
    """Raise for a product of operands with different dtypes, which kernels reject but the tracer accepts.

    Raises:
        MixedProductError: naming the operator and the dtypes.
    """
    for node in graph.nodes:
        if node.op == "call_function":
            values = [arg.meta.get("val") if isinstance(arg, fx.Node) else arg for arg in node.args]
            if mixed := mixed_product(node.target, values):
                raise MixedProductError(f"{node.target} multiplies {mixed}")
