"""The pipeline: from a model and a spec to verified Programs over one Store, and to those of further signatures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from graftc.compiler.adapt.context import Work
from graftc.compiler.adapting import adapt_signature
from graftc.compiler.arrivals.arrived import arrived
from graftc.compiler.cached import require_rows_of_one
from graftc.compiler.capture.cache import Known, captured, key
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.defaults import default_signatures
from graftc.compiler.capture.identity.capture_key import walked_once
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.capture.past import CACHE
from graftc.compiler.capture.ranges import fixed_sizes
from graftc.compiler.capture.refusals import by_values
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, axes_of, described, fits, less_dynamic, split
from graftc.compiler.capture.source_model import require_plain
from graftc.compiler.compilation import Compilation, Graphs, Resolution
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.resolve.cloze import filling, not_filling
from graftc.compiler.resolve.quantise import linear_maps, quantised
from graftc.compiler.resolve.tokens import with_room
from graftc.compiler.resolve.untie import untied
from graftc.compiler.source_watch import SourceWatch
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.ir.program_key import Signature
from graftc.passes.core.weights.store import Store
from graftc.specs.compose import Parallel
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.options.base import BaseOptions


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
            graphs, found = _made(compilation, attempt, flags, chosen)
        except GraftError as error:
            if error.code != "GC030":
                raise
            failure = failure or error
            if by_values(error.__cause__):
                break
        else:
            if fits(graphs["forward", "train", "adapted"].inputs, inputs):
                return _included(compilation, graphs, found)
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
    return _included(compilation, *_made(compilation, axes, flags, chosen, initial))


def _made(
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


def recompile(
    compilation: Compilation,
    spec: Spec,
    values: Mapping[str, Tensor],
    model: nn.Module | None = None,
    axes: Sequence[Axis] | None = None,
) -> Compilation:
    """A Compilation of another spec for the same first signature.

    Args:
        compilation: has the signature, the seed and the captures.
        spec: what to adapt there.
        values: adapter tensors to start from, by name.
        model: another base; by default the one that ``compilation`` was given.
        axes: inputs of other element types, where the base is of another one.
    """
    known = {**compilation.known, **_captures(compilation)}
    return compile_model(
        spec,
        compilation.source if model is None else model,
        compilation.main.axes if axes is None else axes,
        flags=compilation.program("train", "base").flags,
        start=StartingPoint(compilation.seed, compilation.use_cache, values, known),
    )


def _captures(compilation: Compilation) -> dict[str, Callable[[], Capture | None]]:
    """What a Compilation was made of, so that nothing is captured twice."""
    captures = (capture for found in compilation.signatures.values() for capture in found.captures)
    return {capture.key: partial(_again, capture) for capture in captures if capture.key is not None}


def _again(capture: Capture) -> Capture:
    return replace(capture, traced=capture.traced.copy(), flat=None)


@dataclass(frozen=True)
class StartingPoint:
    """What a compilation starts from beside a spec and a model.

    Attributes:
        seed: initial values are drawn from it.
        use_cache: look up and keep the captured graph in the user's cache folder.
        values: adapter tensors to start from instead of initial values, by name.
        known: captures to use instead of capturing, by their key.
        every_layer: write every layer out from the beginning, for who looks at graphs and runs none.
    """

    seed: int = 0
    use_cache: bool = True
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=dict, repr=False)
    every_layer: bool = False


@exclusive()
@walked_once()
def compile_model(
    spec: Spec,
    model: nn.Module,
    axes: Sequence[Axis] | None = None,
    *,
    flags: Flags = (),
    start: StartingPoint = StartingPoint(),
) -> Compilation:
    """Compile a spec against a model. The model is never changed.

    Args:
        spec: what to adapt.
        model: any module that torch.export captures.
        axes: its inputs; the model's usual ones by default.
        flags: other keyword arguments of its calls.
        start: its seed, and what is there already.

    Raises:
        GraftError: with a code for whatever is wrong with the spec, the model or their fit.
    """
    require_plain(model)
    given: dict[str, nn.Parameter] = {}
    known = start.known
    try:
        model = source = arrived(model)
        if spec.base.quantize is not None:
            given = dict(model.named_parameters(remove_duplicate=False))
            found = quantised_base(model, spec.base, axes, flags=flags, use_cache=start.use_cache, known=known)
            model = source = found[0]  # so that nothing holds the weights as they were
            known = {**known, **found[1]}
        if spec.untie:
            model = untied(model, spec.untie, axes)
        if spec.tokens is not None:
            model = with_room(model, spec.tokens)
        if spec.cloze is not None:
            model = filling(model, spec.cloze)
    except GraftError as error:
        raise spec.locate(error) from error
    store = Store.mirror(model)
    originals = {name: tensor.detach() for name, tensor in given.items() if name in store.packed}
    compilation = Compilation(
        spec,
        model,
        store,
        source,
        SourceWatch(source),
        start.seed,
        start.use_cache,
        known,
        every_layer=start.every_layer,
    )
    initial = Initial(start.seed, start.values, originals, compilation.narrow)
    del given, originals

    def attempt(tried: Sequence[Axis]) -> Signature:
        graphs, made = _made(compilation, tried, flags, (), initial)
        notes = (*made.notes, *fixed_sizes(axes or (), tried))
        return _included(compilation, graphs, made.with_notes(notes))

    try:
        first_capture(model, axes, attempt)
    except GraftError as error:
        if spec.cloze is None:
            raise
        raise spec.locate(not_filling(error, model, spec.cloze)) from error
    return compilation


def quantised_base(
    model: nn.Module,
    options: BaseOptions,
    axes: Sequence[Axis] | None = None,
    *,
    flags: Flags = (),
    use_cache: bool = True,
    known: Known = MappingProxyType({}),
) -> tuple[nn.Module, dict[str, Callable[[], Capture | None]]]:
    """A model with the weights of its linear maps and experts packed, and the capture that it has in common with the
    model as it was, by its key: graphs read weights, however they are stored.

    Args:
        model: the source, which is not changed.
        options: the format, and what is left out.
        axes, flags, use_cache, known: as for `compile_model`.

    Raises:
        GraftError: as `graftc.compiler.resolve.quantise.quantised`; GC030 where the model cannot be captured.
    """
    aliases = Store.mirror(model).aliases

    def attempt(tried: Sequence[Axis]) -> tuple[CaptureRequest, Capture]:
        request = CaptureRequest(model, tuple(tried), flags, aliases=aliases)
        return request, captured(request, use_cache=use_cache, known=known)

    request, found = first_capture(model, axes, attempt)
    made = same_fresh(model, quantised(model, options, linear_maps(found)))
    name = key(replace(request, model=made))
    return made, {} if name is None else {name: partial(_again, found)}


T = TypeVar("T")


def first_capture(model: nn.Module, axes: Sequence[Axis] | None, run: Callable[[Sequence[Axis]], T]) -> T:
    """What ``run`` gives for the first inputs that can be captured: those shown or the model's usual ones, then the
    same with fixed sizes.

    Raises:
        GraftError: GC030, the first of its kind, when none can be.
    """
    choices = [list(axes)] if axes is not None else list(default_signatures(model))
    attempts = [list(less_dynamic(choice)) for choice in choices]
    failure: GraftError | None = None
    for attempt in [first for first, *_ in attempts] + [other for _, *others in attempts for other in others]:
        try:
            return run(attempt)
        except GraftError as error:
            if error.code != "GC030" or by_values(error.__cause__):
                raise
            failure = failure or error
    assert failure is not None
    raise failure
