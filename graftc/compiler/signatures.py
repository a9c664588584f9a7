"""Create the Programs of a new kind of call, and add them to a Compilation as a signature."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.adapt.context import Work
from graftc.compiler.adapting import adapt_signature
from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.identity.capture_key import walked_once
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import CACHE
from graftc.compiler.capture.ranges import fixed_notes, fixed_sizes
from graftc.compiler.capture.refusals import by_values
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, axes_of, described, fits, fixed_where_bound, less_dynamic, split
from graftc.compiler.compilation import Compilation
from graftc.compiler.partial_graphs import require_rows_of_one
from graftc.compiler.resolution import Graphs, Resolution
from graftc.compiler.stored_signatures import compile_stored
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program_key import Signature
from graftc.specs.compose import Parallel
from graftc.specs.errors.diagnostics import GraftError


def signature_for(compilation: Compilation, inputs: Mapping[str, Any]) -> Signature:
    """Return the signature whose Programs apply to a call's tensors and flags; capture it if it is new.

    Raises:
        GraftError: GC031 if the signature cannot be captured, or its graph does not read an adapted place.
    """
    signature = compilation.find(inputs)
    if signature is not None:
        return signature
    with exclusive(), walked_once():
        compile_stored(compilation, inputs)
        signature = compilation.find(inputs)  # another thread may have added it in the meantime
        return signature if signature is not None else _new_signature(compilation, inputs)


def _new_signature(compilation: Compilation, inputs: Mapping[str, Any]) -> Signature:
    compilation.watch.look()
    tensors, flags = split(inputs)
    if CACHE in inputs:
        require_rows_of_one(compilation)
    chosen = [name for name in compilation.controls if name in tensors]
    tensors = {name: value for name, value in tensors.items() if name not in chosen}
    _check_room(compilation, tensors)
    known = [Axis(s.name, s.dtype, s.shape) for s in compilation.program_as_run("train", "base").inputs]
    axes = axes_of(compilation.model, tensors, known)
    failure: GraftError | None = None
    for attempt in less_dynamic(axes, tensors):
        try:
            adapted = _fitting(compilation, attempt, flags, chosen, inputs)
        except GraftError as error:
            if error.code != "GC030":
                raise
            failure = failure or error
            if by_values(error.__cause__):
                break
        else:
            if adapted is not None:
                return _included(compilation, *adapted)
    raise _not_captured(compilation, axes, flags, failure)


def _check_room(compilation: Compilation, tensors: Mapping[str, Tensor]) -> None:
    """Check that adaptations that occupy positions leave enough of them for a text.

    Raises:
        GraftError: GC020 if they do not.
    """
    adapted = compilation.program_as_run("train")
    own = {spec.name: spec for spec in adapted.inputs}
    for source in compilation.program_as_run("train", "source").inputs:
        if source.name not in tensors or source.name not in own:
            continue
        axes = own[source.name].shape, own[source.name].ranges, source.ranges
        for size, name, (_, most), (_, before) in zip(tensors[source.name].shape, *axes, strict=False):
            if most is not None and most != before and size > most:
                message = (
                    f"{source.name} has {size} tokens; besides those of its adaptations, the model can read {most}"
                )
                message += f": {why}" if (why := adapted.limits.get(str(name))) else ""
                raise GraftError("GC020", message, hint="shorten the text")


def _not_captured(
    compilation: Compilation, axes: Sequence[Axis], flags: Flags, failure: GraftError | None
) -> GraftError:
    base, model = compilation.program("train", "base"), type(compilation.model).__name__
    usual = {s.name: s.dtype for s in base.inputs}
    new = [axis for axis in axes if axis.name not in usual], tuple(f for f in flags if f not in base.flags)
    other = next((axis for axis in axes if axis.dtype != usual.get(axis.name, axis.dtype)), None)
    reason = failure.message if failure is not None else f"{model} has none that fits these sizes"
    hint = failure.hint if failure is not None else "the model may not accept inputs of these sizes"
    if any(new):
        hint = f"leave out {described(*new)}"
    elif other is not None:
        hint = f"{other.name} is {_named(other.dtype)}; the model was compiled with {_named(usual[other.name])}"
    return GraftError("GC031", f"no graph can be made: {reason}", hint=hint)


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@exclusive()
def add_signature(
    compilation: Compilation,
    axes: Sequence[Axis],
    flags: Flags = (),
    chosen: Sequence[str] = (),
    initial: Initial | None = None,
) -> Signature:
    """Capture one more signature and adapt the same places in it.

    Args:
        compilation: the Compilation, to which the Programs are added.
        axes, flags: the inputs and flags that the source model is called with.
        chosen: names of the `controls` that calls also pass; those that every call passes may be omitted.
        initial: the source of values for new tensors; by default they are drawn from the Compilation's seed.

    Returns:
        The signature, which may be an existing one.

    Raises:
        GraftError: GC031 if the new graph does not read an adapted place.
    """
    return _included(compilation, *_adapted(compilation, axes, flags, chosen, initial))


def add_first(
    compilation: Compilation,
    axes: Sequence[Axis] | None,
    flags: Flags,
    initial: Initial,
    notes: Sequence[str] = (),
) -> Signature:
    """Capture the first signature, trying different inputs until some can be captured, and adapt it.

    Args:
        compilation: the Compilation, which has no signature yet.
        axes, flags: the inputs (None for the default inputs) and the flags that the source model is called with.
        initial: the source of values for new tensors.
        notes: notes about the model to display, in addition to those from the capture.

    Raises:
        GraftError: GC030 if the model cannot be captured, and other codes if the spec is invalid or does not fit.
    """

    def attempt(tried: Sequence[Axis]) -> Signature:
        shown = {axis.name: axis.shown for axis in tried if axis.shown is not None}
        adapted = _fitting(compilation, tried, flags, (), shown, initial)
        if adapted is None:
            raise _for_other_sizes(compilation.model, shown)
        bound = fixed_notes(tried, adapted[0]["forward", "train", "base"].inputs)
        messages = dict.fromkeys((*notes, *bound, *adapted[1].notes, *fixed_sizes(axes or (), tried)))
        return _included(compilation, *adapted, messages)

    return first_capture(compilation.model, axes, attempt)


def _for_other_sizes(model: nn.Module, shown: Mapping[str, Tensor]) -> GraftError:
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shown.items())
    message = f"{type(model).__name__} has a graph that does not fit the sizes shown: {sizes}"
    return GraftError("GC030", message, hint="its Python code computes different things for different sizes")


def _fitting(
    compilation: Compilation,
    axes: Sequence[Axis],
    flags: Flags,
    chosen: Sequence[str],
    present: Mapping[str, Any],
    initial: Initial | None = None,
) -> tuple[Graphs, Resolution] | None:
    """Return the graphs for these axes if they apply to a call, otherwise None.

    Args:
        present: the call's tensors, by name; sizes that turn out to be bound are captured with their values in it.
    """
    for _ in range(2):
        graphs, resolution = _adapted(compilation, axes, flags, chosen, initial)
        every = graphs["forward", "train", "adapted"].inputs
        inputs = [spec for spec in every if spec.name in present or (CACHE in present and is_past(spec.name))]
        if fits(inputs, present):
            return graphs, resolution
        before, axes = axes, fixed_where_bound(axes, inputs, present)
        if list(before) == axes:
            break
    return None


def _adapted(
    compilation: Compilation,
    axes: Sequence[Axis],
    flags: Flags,
    chosen: Sequence[str],
    initial: Initial | None = None,
) -> tuple[Graphs, Resolution]:
    """Create the graphs of a signature without adding them to the Compilation."""
    always = [name for name, composition in compilation.controls.items() if isinstance(composition, Parallel)]
    request = CaptureRequest(compilation.model, tuple(axes), flags, aliases=compilation.store.aliases)
    places = compilation.places() if compilation.signatures else None
    values = Initial(compilation.seed, narrow=compilation.narrow) if initial is None else initial
    return adapt_signature(Work(compilation, request, list(dict.fromkeys([*always, *chosen])), places, values))


def _included(
    compilation: Compilation, graphs: Graphs, resolution: Resolution, notes: Iterable[str] | None = None
) -> Signature:
    """Add graphs to the Compilation unless it already has their signature, and return the signature.

    Args:
        compilation: the Compilation.
        graphs, resolution: the graphs and their Resolution.
        notes: notes for display about the graphs; by default those of the Resolution.
    """
    if resolution.signature not in compilation.signatures:
        compilation.table.add(graphs, resolution, resolution.notes if notes is None else notes)
    return resolution.signature
