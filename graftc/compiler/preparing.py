"""Prepare a source model for capture in a list of steps, each requested by a part of the spec.

No step changes the model that it is given; a copy shares all unchanged storage.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.capture_cache import Known, key
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.interface import Flags, device_of
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.capture.source_model import require_plain
from graftc.compiler.live.elements import as_inputs, layers_of, maps_of, union_of
from graftc.compiler.live.kinds import captured_by_kinds
from graftc.compiler.live.levels import taken_apart
from graftc.compiler.live.refusals import refuse_whole
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.quantised_sources.convert import arrived
from graftc.compiler.resolve.cloze import filling, not_filling
from graftc.compiler.resolve.quantise import linear_maps, quantised
from graftc.compiler.resolve.replicate import replicated
from graftc.compiler.resolve.tokens import with_room
from graftc.compiler.resolve.untie import untied
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import counted

Level = Literal["graph", "layers", "modules"]
"""The unit that is captured as one graph: the whole model, each of its layers, or each of its maps. Between graphs, the
model's own Python code runs."""


@dataclass(frozen=True)
class StartingPoint:
    """Inputs of a compilation in addition to the spec and the model.

    Attributes:
        seed: the seed for drawing initial values.
        use_cache: whether to look up and store the captured graph in the user's cache folder.
        values: adapter tensors to start from instead of initial values, by name.
        known: existing captures to use instead of capturing, by key.
        every_layer: whether to write out every layer from the beginning, for callers that only inspect graphs.
        level: how much of the model each graph covers; by default, as much as possible.
        because: the reason why the whole model is not one graph.
        requantised: names of packed weights of the model whose codes were chosen by an adaptation, which may be gone.
        shown: a function that runs a model that is taken apart, to show how it calls its layers; by default, one call
            on the model's inputs.
    """

    seed: int = 0
    use_cache: bool = True
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=dict, repr=False)
    every_layer: bool = False
    level: Level | None = None
    because: str = ""
    requantised: frozenset[str] = frozenset()
    shown: Callable[[nn.Module], Any] | None = None

    @property
    def takes_apart(self) -> bool:
        """Whether only parts of the model are graphs."""
        return self.level not in (None, "graph")


@dataclass(frozen=True)
class Prepared:
    """A model that is being prepared for capture.

    Attributes:
        spec: the document that specifies what to adapt.
        model: the model that is captured.
        source: the model as it was given, with its weights packed if the spec requests it.
        axes: the model's inputs; None for its default inputs.
        flags: other keyword arguments that the model is called with.
        start: existing captures and values, and how much of the model each graph covers.
        unpacked: the parameters as they were before being packed for the spec, by name.
        whole: the model before it was taken apart; None if it is one graph.
        notes: notes for display about parts that are not captured as one graph.
        in_the_way: the reasons why they are not, by the path of the stack of layers concerned; the reason for the whole
            model is under the empty path.
        written: names of the buffers that the Python code between graphs writes to.
        read: names of the parameters that this code reads.
    """

    spec: Spec
    model: nn.Module
    source: nn.Module
    axes: Sequence[Axis] | None = None
    flags: Flags = ()
    start: StartingPoint = StartingPoint()
    unpacked: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)
    whole: nn.Module | None = None
    notes: tuple[str, ...] = ()
    in_the_way: Mapping[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


def _quantise(prepared: Prepared) -> Prepared:
    """Pack the weights of linear maps and experts.

    Graphs read weights regardless of how they are stored, so the capture that locates the maps also fits the packed
    model.
    """
    model, spec, start = prepared.model, prepared.spec, prepared.start
    if spec.base.quantize is None:
        return prepared
    apart = _take_apart(prepared)
    aliases = Store.mirror(apart.model).aliases

    def attempt(axes: Sequence[Axis]) -> tuple[CaptureRequest, Capture]:
        request = CaptureRequest(apart.model, tuple(axes), apart.flags, aliases=aliases)
        return request, captured_by_kinds(request, apart.start.known, use_cache=start.use_cache)

    request, capture = first_capture(apart.model, apart.axes, attempt)
    packed = same_fresh(model, quantised(model, spec.base, linear_maps(capture)))
    again = replace(apart, model=packed, source=packed)  # so that nothing keeps the original weights alive
    name = key(replace(request, model=_take_apart(again).model))
    return replace(
        again,
        start=start if name is None else replace(start, known={**start.known, name: capture.again}),
        unpacked=dict(model.named_parameters(remove_duplicate=False)),
    )


def _replicate(prepared: Prepared) -> Prepared:
    ranges = prepared.spec.layer_replication
    return replace(prepared, model=replicated(prepared.model, ranges)) if ranges else prepared


def _untie(prepared: Prepared) -> Prepared:
    untie = prepared.spec.untie
    # The axes of an earlier Compilation's calls are not those of the model, whose outputs it has compared.
    axes = () if elements_in(prepared.flags) else prepared.axes
    return replace(prepared, model=untied(prepared.model, untie, axes)) if untie else prepared


def _make_room(prepared: Prepared) -> Prepared:
    tokens = prepared.spec.tokens
    return prepared if tokens is None else replace(prepared, model=with_room(prepared.model, tokens))


def _fill(prepared: Prepared) -> Prepared:
    cloze = prepared.spec.cloze
    return prepared if cloze is None else replace(prepared, model=filling(prepared.model, cloze))


def _take_apart(prepared: Prepared) -> Prepared:
    """Replace the model with the union of its elements, called as in a run on the example inputs.

    Flags that already describe the calls come from an earlier Compilation.
    """
    start = prepared.start
    if not start.takes_apart:
        return prepared
    if elements := elements_in(prepared.flags):
        return replace(prepared, model=union_of(prepared.model, elements), whole=prepared.model)
    model, axes = prepared.model, prepared.axes
    shown = default_axes(model) if axes is None else axes
    device = device_of(model)
    inputs = {**{axis.name: axis.given(device) for axis in shown}, **dict(prepared.flags)}
    run = start.shown or (lambda own: own(**inputs))
    apart = taken_apart(model, run, maps_alone=start.level == "modules", use_cache=start.use_cache)
    if apart.by_maps and prepared.spec.capture == "layers":
        row, reason = next(iter(apart.by_maps.items()))
        message = f"the layers of {row} cannot be graphs: {reason}"
        raise GraftError("GC030", message, place=Place(path="capture"), hint="capture: modules adapts their maps")
    calls, flags = as_inputs(apart.calls)
    rows = [f"in {row}, single maps are graphs, and roles are not known: {why}" for row, why in apart.by_maps.items()]
    rows += [f"in {row}, parts of layers are graphs: {why}" for row, why in apart.by_parts.items()]
    rows += [f"the inputs shown do not call {row}, so nothing is adapted there" for row in apart.uncalled]
    notes = (_told(apart.calls, model, start.because), *rows)
    union = union_of(model, elements_in(flags))
    return replace(
        prepared,
        model=union,
        whole=model,
        axes=calls,
        flags=flags,
        start=replace(start, known={**start.known, **apart.captures}),
        notes=notes,
        written=apart.written,
        read=apart.read,
        in_the_way={"": start.because, **apart.by_parts, **apart.by_maps},
    )


def _told(elements: Collection[str], model: nn.Module, because: str) -> str:
    """Return a sentence that states which parts of a model are graphs."""
    name, known_maps = type(model).__name__, set(maps_of(model))
    maps = len(known_maps.intersection(elements))
    layers = len(set(layers_of(model)).intersection(elements) - known_maps)
    kinds = ((layers, "layer"), (len(elements) - layers - maps, "layer part"), (maps, "map"))
    parts = [counted(number, what) for number, what in kinds if number]
    of = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{name} runs its own Python code between graphs of {of}" + (f": {because}" if because else "")


def prepare(prepared: Prepared) -> Prepared:
    """Run the steps that the spec requests.

    Raises:
        GraftError: GC073, GC032 and GC130 for a model that cannot be compiled, GC162 for a library's quantisation that
            cannot be converted, GC030 if quantising needs a capture and none can be made, and any error from a part of
            the spec, with the place in the spec.
    """
    try:
        require_plain(prepared.model)
        if prepared.start.takes_apart:
            refuse_whole(prepared.spec, type(prepared.source).__name__)
        model = arrived(prepared.model)
        prepared = replace(prepared, model=model, source=model)
        for step in (_quantise, _replicate, _untie, _make_room, _fill, _take_apart):
            prepared = step(prepared)
    except GraftError as error:
        located = prepared.spec.locate(error)
        if located is error:
            raise
        raise located from error
    return prepared


def explained(error: GraftError, prepared: Prepared) -> GraftError:
    """Restate, in terms of the spec, the error for a prepared model that cannot be captured, and add its place there.

    GC037 becomes GC149 if only parts of the model are graphs: the inputs of layers need not have a batch axis, so
    nothing can be chosen per row.
    """
    if prepared.spec.cloze is not None:
        error = not_filling(error, prepared.model, prepared.spec.cloze)
    if error.code == "GC037" and prepared.start.takes_apart:
        name = type(prepared.source).__name__
        message = f"{name} is taken apart into its layers, but a choice for each row of a batch applies to a whole call"
        error = GraftError("GC149", message, place=error.place, hint="adapt layers and maps instead")
    return prepared.spec.locate(error)
