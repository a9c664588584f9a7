"""The anchor: compare a base graph with the source model itself on the same inputs.

All other evidence compares graphs with graphs, and rests on this comparison. The model runs unchanged, with its hooks,
its patched forwards and its own kernels, but without the changes made for the tracer; the graph runs node by node over
the same tensors. Matrix products with stored weights, which take most of the time, are computed once for both and for
all modes (`anchoring/products.py`).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.anchored import Anchor as Anchor
from graftc.compiler.capture.anchoring.runs import NoRunError, Runs
from graftc.compiler.capture.interface import dtype_of, has_values
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, described
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program import Program

BOUNDS: Mapping[torch.dtype, float] = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 1e-2,
    torch.bfloat16: 5e-2,
}
"""The largest allowed difference, by the model's dtype, relative to the largest element of an output. Differences arise
only where the kernels differ."""

_MORE_SAMPLES = 6


def anchor(request: CaptureRequest, program: Program, constants: Mapping[str, Tensor]) -> Anchor:
    """Compare the source model with its graph on the same inputs.

    Args:
        request: the source model, and the calls that the graph serves. The model's state is restored afterwards, and so
            are the random states of torch, Python and numpy.
        program: the verified graph.
        constants: tensors that the graph uses in addition to the model's own.
    """
    started, model = time.perf_counter(), request.model
    mode, bound = request.mode, BOUNDS.get(dtype_of(model), BOUNDS[torch.float32])
    inputs = described(request.axes, request.flags)

    def result(difference: float | None, **more: Any) -> Anchor:
        return Anchor(inputs, mode, difference, bound, seconds=time.perf_counter() - started, **more)

    if not has_values(model):
        return result(None, skipped="the model is on the meta device")
    if other := _other_interface(program, request.axes):
        return result(float("inf"), differing=(other,))
    run = Runs(request, program, constants)
    try:
        ours, on = run.first()
    except NoRunError as error:
        return result(None, skipped=f"the model does not run on sample inputs: {error}")
    sampled = on == "samples"
    worst, differing = run.against(ours, bound)
    for seed in range(1, _MORE_SAMPLES):
        if worst == 0 or differing or not sampled:
            break
        # Different kernels round differently, so one sample may be within the bound by chance.
        try:
            more = run.model(run.sample(seed))
        except NoRunError:
            break
        other_worst, differing = run.against(more, bound)
        worst = max(worst, other_worst)
    if sampled and not differing and any(map(is_past, program.signature)):
        stepped, differing = run.steps(ours, bound)
        worst = max(worst, stepped)
    special = run.special_ones(bound) if sampled and not differing else ()
    return result(worst, differing=tuple(differing), assigned=tuple(run.assigned), plain=on == "ones", from_two=special)


def _other_interface(program: Program, axes: Sequence[Axis]) -> str | None:
    """Return a description of a graph's inputs if they are not the requested ones, otherwise None."""
    requested = [(axis.name, axis.dtype, len(axis.axes)) for axis in axes]
    takes = [(spec.name, spec.dtype, len(spec.shape)) for spec in program.inputs]
    names = [str(node.target) for node in program.placeholders()]
    if sorted(requested, key=str) != sorted(takes, key=str) or names != list(program.signature):
        return f"it takes {', '.join(program.signature)}"
    return None
