"""What is done to a source model before it is captured: a list of steps, each asked for by a part of the spec.

No step changes the model that it is given; a copy shares all storage that stays the same.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from torch import nn

from graftc.compiler.arrivals.arrived import arrived
from graftc.compiler.capture.attempts import first_capture
from graftc.compiler.capture.cache import Known, captured, key
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.capture.source_model import require_plain
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.resolve.cloze import filling, not_filling
from graftc.compiler.resolve.quantise import linear_maps, quantised
from graftc.compiler.resolve.tokens import with_room
from graftc.compiler.resolve.untie import untied
from graftc.passes.core.weights.store import Store
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True)
class Prepared:
    """A model on its way from the user to capture.

    Attributes:
        spec: what is to be adapted.
        model: what is captured.
        source: the model as it was given, with its weights packed where the spec asks for that.
        axes: its inputs; None for the model's usual ones.
        flags: other keyword arguments of its calls.
        use_cache: look up and keep captured graphs in the user's cache folder.
        known: captures that are there already, by their key.
        unpacked: the parameters as they were before the spec had them packed, by name.
    """

    spec: Spec
    model: nn.Module
    source: nn.Module
    axes: Sequence[Axis] | None = None
    flags: Flags = ()
    use_cache: bool = True
    known: Known = field(default_factory=dict, repr=False)
    unpacked: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)


def _same(error: GraftError, prepared: Prepared) -> GraftError:
    return error


@dataclass(frozen=True)
class Preparation:
    """One step on that way.

    Attributes:
        name: for people.
        asked: whether a spec asks for it.
        apply: the model with the step taken.
        explain: the reason why a model with the step taken cannot be captured, in the words of the spec.
    """

    name: str
    asked: Callable[[Spec], bool]
    apply: Callable[[Prepared], Prepared]
    explain: Callable[[GraftError, Prepared], GraftError] = _same


def _plain(prepared: Prepared) -> Prepared:
    require_plain(prepared.model)
    return prepared


def _arrive(prepared: Prepared) -> Prepared:
    model = arrived(prepared.model)
    return replace(prepared, model=model, source=model)


def _quantise(prepared: Prepared) -> Prepared:
    """The weights of linear maps and experts packed. Graphs read weights, however they are stored, so that the capture
    which says where they are is that of the packed model too."""
    model, spec = prepared.model, prepared.spec
    aliases = Store.mirror(model).aliases

    def attempt(axes: Sequence[Axis]) -> tuple[CaptureRequest, Capture]:
        request = CaptureRequest(model, tuple(axes), prepared.flags, aliases=aliases)
        return request, captured(request, use_cache=prepared.use_cache, known=prepared.known)

    request, capture = first_capture(model, prepared.axes, attempt)
    packed = same_fresh(model, quantised(model, spec.base, linear_maps(capture)))
    name = key(replace(request, model=packed))
    return replace(
        prepared,
        model=packed,
        source=packed,  # so that nothing holds the weights as they were
        known={**prepared.known, **({} if name is None else {name: capture.again})},
        unpacked=dict(model.named_parameters(remove_duplicate=False)),
    )


def _untie(prepared: Prepared) -> Prepared:
    return replace(prepared, model=untied(prepared.model, prepared.spec.untie, prepared.axes))


def _make_room(prepared: Prepared) -> Prepared:
    tokens = prepared.spec.tokens
    return prepared if tokens is None else replace(prepared, model=with_room(prepared.model, tokens))


def _fill(prepared: Prepared) -> Prepared:
    cloze = prepared.spec.cloze
    return prepared if cloze is None else replace(prepared, model=filling(prepared.model, cloze))


def _not_filling(error: GraftError, prepared: Prepared) -> GraftError:
    cloze = prepared.spec.cloze
    return error if cloze is None else not_filling(error, prepared.model, cloze)


PREPARATIONS = (
    Preparation("plain", lambda _: True, _plain),
    Preparation("arrive", lambda _: True, _arrive),
    Preparation("quantise", lambda spec: spec.base.quantize is not None, _quantise),
    Preparation("untie", lambda spec: bool(spec.untie), _untie),
    Preparation("make room for tokens", lambda spec: spec.tokens is not None, _make_room),
    Preparation("fill blanks", lambda spec: spec.cloze is not None, _fill, _not_filling),
)
"""Every step, in order."""


def prepare(prepared: Prepared) -> Prepared:
    """Take the steps that the spec asks for.

    Raises:
        GraftError: GC073, GC032 and GC130 for what cannot be compiled, GC162 for what a library quantised in a way that
            cannot be taken over, GC030 where quantising needs a capture and there is none, and whatever is wrong with
            the spec's part, at its place in the spec.
    """
    try:
        for step in PREPARATIONS:
            if step.asked(prepared.spec):
                prepared = step.apply(prepared)
    except GraftError as error:
        located = prepared.spec.locate(error)
        if located is error:
            raise
        raise located from error
    return prepared


def explained(error: GraftError, prepared: Prepared) -> GraftError:
    """The reason why a prepared model cannot be captured, in the words of the spec, at its place there."""
    for step in PREPARATIONS:
        if step.asked(prepared.spec):
            error = step.explain(error, prepared)
    return prepared.spec.locate(error)
