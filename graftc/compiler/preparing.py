"""Preparation of a source model before it is captured: a list of steps, each requested by a part of the spec.

No step changes the model that it is given; a copy shares all storage that stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from torch import Tensor, nn

from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.capture_cache import Known, captured, key
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.interface import Flags, device_of
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.capture.source_model import require_plain
from graftc.compiler.live.elements import as_inputs, layers_of, maps_of, union_of
from graftc.compiler.live.levels import taken_apart
from graftc.compiler.live.refusals import refuse_whole
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.quantised_sources.convert import arrived
from graftc.compiler.resolve.cloze import filling, not_filling
from graftc.compiler.resolve.quantise import linear_maps, quantised
from graftc.compiler.resolve.tokens import with_room
from graftc.compiler.resolve.untie import untied
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import counted

Level = Literal["graph", "layers", "modules"]
"""How much of a model is one graph: all of it, each of its layers, or each of its maps, between which its own Python
runs."""


@dataclass(frozen=True)
class StartingPoint:
    """Inputs of a compilation in addition to the spec and the model.

    Attributes:
        seed: the seed that initial values are drawn from.
        use_cache: whether to look up and keep the captured graph in the user's cache folder.
        values: adapter tensors to start from instead of initial values, by name.
        known: captures to use instead of capturing, by their key.
        every_layer: whether to write every layer out from the beginning, for callers that inspect graphs and run none.
        level: how much of the model is one graph; by default as much as possible.
        because: the reason why it is not all of it.
        shown: called with a model that is taken apart to see how it calls its layers; one call on its inputs by
            default.
    """

    seed: int = 0
    use_cache: bool = True
    values: Mapping[str, Tensor] = field(default_factory=dict, repr=False)
    known: Known = field(default_factory=dict, repr=False)
    every_layer: bool = False
    level: Level | None = None
    because: str = ""
    shown: Callable[[nn.Module], Any] | None = None

    @property
    def takes_apart(self) -> bool:
        """Whether only parts of the model are graphs."""
        return self.level not in (None, "graph")


@dataclass(frozen=True)
class Prepared:
    """A model while it is prepared for capture.

    Attributes:
        spec: the document that says what is to be adapted.
        model: the model that is captured.
        source: the model as it was given, with its weights packed if the spec requests it.
        axes: its inputs; None for the model's usual ones.
        flags: other keyword arguments of its calls.
        start: what exists already, and how much of the model is one graph.
        unpacked: the parameters from before the spec had them packed, by name.
        notes: messages for people about what is not one graph.
        in_the_way: the reasons by the path of a stack of layers, with the model's own under the empty path.
        written: names of the buffers that the Python between graphs writes to.
        read: names of the parameters that it reads.
    """

    spec: Spec
    model: nn.Module
    source: nn.Module
    axes: Sequence[Axis] | None = None
    flags: Flags = ()
    start: StartingPoint = StartingPoint()
    unpacked: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)
    notes: tuple[str, ...] = ()
    in_the_way: Mapping[str, str] = field(default_factory=dict)
    written: tuple[str, ...] = ()
    read: tuple[str, ...] = ()


def _quantise(prepared: Prepared) -> Prepared:
    """Pack the weights of linear maps and experts.

    Graphs read weights however they are stored, so the capture that locates them also fits the packed model.
    """
    model, spec, start = prepared.model, prepared.spec, prepared.start
    if spec.base.quantize is None:
        return prepared
    aliases = Store.mirror(model).aliases

    def attempt(axes: Sequence[Axis]) -> tuple[CaptureRequest, Capture]:
        request = CaptureRequest(model, tuple(axes), prepared.flags, aliases=aliases)
        return request, captured(request, use_cache=start.use_cache, known=start.known)

    request, capture = first_capture(model, prepared.axes, attempt)
    packed = same_fresh(model, quantised(model, spec.base, linear_maps(capture)))
    name = key(replace(request, model=packed))
    return replace(
        prepared,
        model=packed,
        source=packed,  # so that nothing keeps the original weights alive
        start=start if name is None else replace(start, known={**start.known, name: capture.again}),
        unpacked=dict(model.named_parameters(remove_duplicate=False)),
    )


def _untie(prepared: Prepared) -> Prepared:
    untie = prepared.spec.untie
    return replace(prepared, model=untied(prepared.model, untie, prepared.axes)) if untie else prepared


def _make_room(prepared: Prepared) -> Prepared:
    tokens = prepared.spec.tokens
    return prepared if tokens is None else replace(prepared, model=with_room(prepared.model, tokens))


def _fill(prepared: Prepared) -> Prepared:
    cloze = prepared.spec.cloze
    return prepared if cloze is None else replace(prepared, model=filling(prepared.model, cloze))


def _take_apart(prepared: Prepared) -> Prepared:
    """Replace the model by the union of its layers, called as in a run on the inputs shown.

    Flags that already say how a layer is called come from an earlier Compilation.
    """
    start = prepared.start
    if not start.takes_apart:
        return prepared
    if elements := elements_in(prepared.flags):
        return replace(prepared, model=union_of(prepared.model, elements))
    model, axes = prepared.model, prepared.axes
    shown = default_axes(model) if axes is None else axes
    device = device_of(model)
    inputs = {**{axis.name: axis.given(device) for axis in shown}, **dict(prepared.flags)}
    run = start.shown or (lambda own: own(**inputs))
    apart = taken_apart(model, run, maps_alone=start.level == "modules")
    if apart.by_maps and prepared.spec.capture == "layers":
        row, reason = next(iter(apart.by_maps.items()))
        message = f"the layers of {row} cannot be graphs: {reason}"
        raise GraftError("GC030", message, place=Place(path="capture"), hint="capture: modules adapts their maps")
    calls, flags = as_inputs(apart.calls)
    rows = [f"of {row} single maps are graphs, where roles are not known: {why}" for row, why in apart.by_maps.items()]
    rows += [f"of {row} parts of layers are graphs: {why}" for row, why in apart.by_parts.items()]
    rows += [f"the inputs shown do not call {row}, where nothing is adapted" for row in apart.uncalled]
    notes = (_told(apart.calls, model, start.because), *rows)
    union = union_of(model, elements_in(flags))
    return replace(
        prepared,
        model=union,
        axes=calls,
        flags=flags,
        notes=notes,
        written=apart.written,
        read=apart.read,
        in_the_way={"": start.because, **apart.by_parts, **apart.by_maps},
    )


def _told(elements: Collection[str], model: nn.Module, because: str) -> str:
    """Return a sentence that says which parts of a model are graphs."""
    name, known_maps = type(model).__name__, set(maps_of(model))
    maps = len(known_maps.intersection(elements))
    layers = len(set(layers_of(model)).intersection(elements) - known_maps)
    kinds = ((layers, "layer"), (len(elements) - layers - maps, "layer part"), (maps, "map"))
    parts = [counted(number, what) for number, what in kinds if number]
    of = " and ".join([", ".join(parts[:-1]), parts[-1]] if len(parts) > 1 else parts)
    return f"{name} is its own Python between graphs of {of}" + (f": {because}" if because else "")


def prepare(prepared: Prepared) -> Prepared:
    """Take the steps that the spec requests.

    Raises:
        GraftError: GC073, GC032 and GC130 for what cannot be compiled, GC162 for what a library quantised in a way that
            cannot be converted, GC030 if quantising needs a capture and there is none, and any error of the spec's
            part, at its place in the spec.
    """
    try:
        require_plain(prepared.model)
        if prepared.start.takes_apart:
            refuse_whole(prepared.spec, type(prepared.source).__name__)
        model = arrived(prepared.model)
        prepared = replace(prepared, model=model, source=model)
        for step in (_quantise, _untie, _make_room, _fill, _take_apart):
            prepared = step(prepared)
    except GraftError as error:
        located = prepared.spec.locate(error)
        if located is error:
            raise
        raise located from error
    return prepared


def explained(error: GraftError, prepared: Prepared) -> GraftError:
    """Return the reason why a prepared model cannot be captured, in the words of the spec, at its place there.

    GC037 becomes GC149 if only parts of the model are graphs: the inputs of layers need not have a batch axis, so
    nothing can choose per row.
    """
    if prepared.spec.cloze is not None:
        error = not_filling(error, prepared.model, prepared.spec.cloze)
    if error.code == "GC037" and prepared.start.takes_apart:
        name = type(prepared.source).__name__
        message = (
            f"{name} is taken apart into its layers, and what is chosen for each row of a batch is of a whole call"
        )
        error = GraftError("GC149", message, place=error.place, hint="adapt layers and maps instead")
    return prepared.spec.locate(error)
