"""The signatures of a Compilation: how the Programs of a new kind of call are made and taken in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.adapt.context import Work
from graftc.compiler.adapting import adapt_signature
from graftc.compiler.cached import require_rows_of_one
from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.identity.capture_key import walked_once
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import CACHE
from graftc.compiler.capture.ranges import fixed_notes, fixed_sizes
from graftc.compiler.capture.refusals import by_values
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, axes_of, described, fits, fixed_where_bound, less_dynamic, split
from graftc.compiler.compilation import Compilation, Graphs, Resolution
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program_key import Signature
from graftc.specs.compose import Parallel
from graftc.specs.errors.diagnostics import GraftError


def signature_for(compilation: Compilation, inputs: Mapping[str, Any]) -> Signature:
    """The signature whose Programs hold for a call's tensors and flags; they are captured when it is first seen.

    Raises:
        GraftError: GC031 for a signature that cannot be captured, or that does not read a place that is adapted.
    """
    signature = compilation.find(inputs)
    if signature is not None:
        return signature
    with exclusive(), walked_once():
        signature = compilation.find(inputs)  # another thread may have made it meanwhile
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
            made = _fitting(compilation, attempt, flags, chosen, inputs)
        except GraftError as error:
            if error.code != "GC030":
                raise
            failure = failure or error
            if by_values(error.__cause__):
                break
        else:
            if made is not None:
                return _included(compilation, *made)
    raise _not_captured(compilation, axes, flags, failure)


def _check_room(compilation: Compilation, tensors: Mapping[str, Tensor]) -> None:
    """Whether adaptations that take positions of their own leave enough of them for a text.

    Raises:
        GraftError: GC020.
    """
    adapted = compilation.program_as_run("train")
    own = {spec.name: spec for spec in adapted.inputs}
    for source in compilation.program_as_run("train", "source").inputs:
        if source.name not in tensors or source.name not in own:
            continue
        axes = own[source.name].shape, own[source.name].ranges, source.ranges
        for size, name, (_, most), (_, before) in zip(tensors[source.name].shape, *axes, strict=False):
            if most is not None and most != before and size > most:
                message = f"{source.name} has {size} tokens; beside those of its adaptations the model reads {most}"
                message += f": {why}" if (why := adapted.limits.get(str(name))) else ""
                raise GraftError("GC020", message, hint="shorten the text")


def _not_captured(
    compilation: Compilation, axes: Sequence[Axis], flags: Flags, failure: GraftError | None
) -> GraftError:
    base, model = compilation.program("train", "base"), type(compilation.model).__name__
    usual = {s.name: s.dtype for s in base.inputs}
    new = [axis for axis in axes if axis.name not in usual], tuple(f for f in flags if f not in base.flags)
    other = next((axis for axis in axes if axis.dtype != usual.get(axis.name, axis.dtype)), None)
    reason = failure.message if failure is not None else f"{model} has none for these sizes"
    hint = failure.hint if failure is not None else "the model may not take inputs of these sizes"
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
    """Capture one more signature and adapt the same places there.

    Args:
        compilation: takes in its Programs.
        axes, flags: what the source model is called with.
        chosen: which of the Compilation's `controls` there are beside; those that every call has need not be named.
        initial: where new tensors get their values; by default they are drawn from the Compilation's seed.

    Returns:
        The signature, which may be one that was there already.

    Raises:
        GraftError: GC031 where the new graph does not read a place that is adapted.
    """
    return _included(compilation, *_adapted(compilation, axes, flags, chosen, initial))


def add_first(
    compilation: Compilation,
    axes: Sequence[Axis] | None,
    flags: Flags,
    initial: Initial,
    notes: Sequence[str] = (),
) -> Signature:
    """Capture the first signature, for the first inputs of those tried that can be captured, and adapt it.

    Args:
        compilation: has no signature yet.
        axes, flags: what the source model is called with; None for its usual inputs.
        initial: where new tensors get their values.
        notes: what people are told of the model beside what capturing it shows.

    Raises:
        GraftError: GC030 when it cannot be captured, and whatever is wrong with the spec or its fit.
    """

    def attempt(tried: Sequence[Axis]) -> Signature:
        shown = {axis.name: axis.shown for axis in tried if axis.shown is not None}
        made = _fitting(compilation, tried, flags, (), shown, initial)
        if made is None:
            raise _for_other_sizes(compilation.model, shown)
        bound = fixed_notes(tried, made[0]["forward", "train", "base"].inputs)
        told = dict.fromkeys((*notes, *bound, *made[1].notes, *fixed_sizes(axes or (), tried)))
        return _included(compilation, made[0], made[1].with_notes(tuple(told)))

    return first_capture(compilation.model, axes, attempt)


def _for_other_sizes(model: nn.Module, shown: Mapping[str, Tensor]) -> GraftError:
    sizes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in shown.items())
    message = f"{type(model).__name__} has a graph for other sizes than those shown: {sizes}"
    return GraftError("GC030", message, hint="its Python decides by sizes what it computes")


def _fitting(
    compilation: Compilation,
    axes: Sequence[Axis],
    flags: Flags,
    chosen: Sequence[str],
    present: Mapping[str, Any],
    initial: Initial | None = None,
) -> tuple[Graphs, Resolution] | None:
    """Graphs that hold for a call; None where those of these axes do not.

    Args:
        present: the tensors of the call by name. Sizes that turn out to be bound are captured as they are there.
    """
    for _ in range(2):
        graphs, found = _adapted(compilation, axes, flags, chosen, initial)
        every = graphs["forward", "train", "adapted"].inputs
        inputs = [spec for spec in every if spec.name in present or (CACHE in present and is_past(spec.name))]
        if fits(inputs, present):
            return graphs, found
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
    """The graphs of a signature, which the Compilation does not have yet."""
    always = [name for name, composition in compilation.controls.items() if isinstance(composition, Parallel)]
    request = CaptureRequest(compilation.model, tuple(axes), flags, aliases=compilation.store.aliases)
    work = Work(compilation, Initial(compilation.seed, narrow=compilation.narrow) if initial is None else initial)
    return adapt_signature(work, request, list(dict.fromkeys([*always, *chosen])))


def _included(compilation: Compilation, graphs: Graphs, found: Resolution) -> Signature:
    """The signature of graphs, which the Compilation has from now on."""
    if found.signature not in compilation.signatures:
        compilation.table.add(graphs, found)
    return found.signature
