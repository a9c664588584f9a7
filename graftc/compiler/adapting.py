"""One signature's Programs: which passes make them, in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from graftc.compiler.adapt.base import anchored, take
from graftc.compiler.adapt.calls import CALLS
from graftc.compiler.adapt.context import Adapting, Work
from graftc.compiler.adapt.evaluate import EVALUATE, Evaluating
from graftc.compiler.adapt.insert import ADAPTATIONS, ADDED_TOKENS, CONTROLS, RECOMPUTE, TRAIN_IN_PLACE
from graftc.compiler.adapt.places import COPY, LENGTHEN, RESOLVE, RESOLVE_TRAIN, ROLES
from graftc.compiler.cached import require_every_edit, require_tokens_alone
from graftc.compiler.capture.anchor import Anchor
from graftc.compiler.capture.as_captured import draws
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.isolation import seldom_collected
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis, inputs_of_program
from graftc.compiler.compilation import CalledResolution, Compilation, Graphs, Places, Resolution
from graftc.compiler.resolve.treated import TreatedUnlikeError
from graftc.passes.core import progress
from graftc.passes.core.added_passes import added_passes, extended
from graftc.passes.core.build.initial import Initial
from graftc.passes.core.ir.eval_mode import moded, to_eval
from graftc.passes.core.ir.functions import UnlikeBodyError, calls, everywhere, split
from graftc.passes.core.ir.history import HistoryEntry
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program import Program, from_two
from graftc.passes.core.ir.program_key import Entry, Mode, Signature, Stage
from graftc.passes.core.ir.verify import record_baseline
from graftc.passes.core.pipeline import Log, Pipeline
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.user_line import again

ADAPT: Pipeline[Adapting] = Pipeline(
    "adapt",
    [
        COPY,
        ROLES,
        RESOLVE,
        LENGTHEN,
        RESOLVE_TRAIN,
        CONTROLS,
        ADDED_TOKENS,
        TRAIN_IN_PLACE,
        ADAPTATIONS,
        RECOMPUTE,
    ],
)
"""From a base that was captured and held against the model to an adapted Program."""

ADAPT_CALLS = Pipeline(ADAPT.name, [*ADAPT.passes, CALLS], ADAPT.given)
"""From a capture whose repeated layers are calls of a function to the adapted Program of train mode."""

EVAL: Pipeline[Evaluating] = Pipeline("eval", [EVALUATE], {"adapted"})
"""From an adapted Program to that of eval mode."""


def adapt_signature(work: Work, request: CaptureRequest, controls: Sequence[str] = ()) -> tuple[Graphs, Resolution]:
    """Capture one signature and adapt it; the first one says which places are adapted, others adapt the same ones.

    Args:
        work: the Compilation that it belongs to, and where new tensors get their values.
        request: the calls of the source model that it is for, in train mode.
        controls: inputs beside these, which choose among adaptations.
    """
    with progress.working("compiling", type(work.compilation.source).__name__), seldom_collected():
        return _adapt_signature(work, request, controls)


def _adapt_signature(work: Work, request: CaptureRequest, controls: Sequence[str]) -> tuple[Graphs, Resolution]:
    log, compilation = Log(), work.compilation
    found = take(work, request, log)
    checked = tuple(log.entries[len(found.traced.history) :])
    taken = Taken(request, found, controls, compilation.places() if compilation.signatures else None, checked)
    if may_call(compilation, taken):
        adapted = _with_calls(work, taken)
        if adapted is not None:
            return adapted
    return _adapt(work, taken)


@dataclass(frozen=True)
class Taken:
    """A capture that is to be adapted.

    Attributes:
        request: what was asked of the capture.
        capture: the capture, held against the source model.
        controls: inputs beside the source model's, by which a call chooses among adaptations.
        places: where the first signature is adapted; None for that itself.
        checked: what its history says of how it was held against the model.
        called: whether layers that are alike call functions.
        anchors: how the graphs of both modes compare with the model, where that is known.
    """

    request: CaptureRequest
    capture: Capture
    controls: Sequence[str]
    places: Places | None
    checked: tuple[HistoryEntry, ...]
    called: bool = False
    anchors: tuple[Anchor, ...] = ()


def may_call(compilation: Compilation, taken: Taken) -> bool:
    """Whether layers of a capture may call functions: they do, and nothing in the spec, and no plugin, is about the
    whole model."""
    if compilation.every_layer:
        return False
    spec, made = compilation.spec, calls(taken.capture.traced.graph)
    plain = not (taken.controls or spec.tokens or spec.train or spec.compose) and spec.cloze is None
    return plain and bool(made) and all(layer_path(one.path) == one.path for one in made) and not added_passes()


def _with_calls(work: Work, taken: Taken) -> tuple[Graphs, Resolution] | None:
    """Adapt a capture whose repeated layers are calls; None where every layer has to be written out. Errors in a spec
    are raised by the written-out graphs, so that their messages name the same places."""
    compilation = work.compilation
    apart = Work(compilation, work.initial, notes=work.notes)
    try:
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                with _added_or_not(compilation.store):
                    graphs, found = _adapt(apart, replace(taken, called=True))
            except TreatedUnlikeError as unlike:
                more = record_baseline(split(taken.capture.traced, unlike.groups))
                capture = replace(taken.capture, traced=more)
                apart = Work(compilation, work.initial, notes=work.notes)
                with _added_or_not(compilation.store):
                    graphs, found = _adapt(apart, replace(taken, capture=capture, called=True))
    except (UnlikeBodyError, GraftError):
        return None
    for each in told:
        again(each)
    called = CalledResolution(replace(found, captures=(taken.capture,)))
    later, anchors = Initial(compilation.seed, narrow=compilation.narrow), found.anchors

    def write_out() -> tuple[Graphs, Resolution]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _adapt(Work(compilation, later), replace(taken, anchors=anchors))

    called.later(write_out)
    return graphs, called


@contextmanager
def _added_or_not(store: Store) -> Iterator[None]:
    """Inside, adaptations add tensors. An error takes them out again: methods that look for tensors of theirs would
    take what an attempt has left for what was trained."""
    before = {name for name, _ in store.adapters()}
    try:
        yield
    except Exception:
        added = [name for name, _ in store.adapters() if name not in before]
        for name in added:
            store.drop(name)
        raise


def _adapt(work: Work, taken: Taken) -> tuple[Graphs, Resolution]:
    compilation, request, found, called = work.compilation, taken.request, taken.capture, taken.called
    train = Adapting(work, request, found, taken.places, taken.controls, called)
    source = train.base
    log = Log([*source.history, *taken.checked])
    program = _adapted(train, log)
    program.history = list(log.entries)
    captures, source_eval = list(train.captures), to_eval(source)
    eval_base = record_baseline(source_eval if train.base is source else to_eval(train.base))
    derived = [anchor for anchor in taken.anchors if anchor.mode == "eval"]
    if not taken.anchors:
        derived = [
            anchored(compilation, c, source_eval if c is found else to_eval(c.program), request.axes)
            for c in train.captures
        ]
    evaluating = Evaluating(train, program, True, eval_base)
    if _is_unlike_eval(eval_base) or not all(held.passed for held in derived):
        # Eval mode is more than train mode without dropout: what it computes has to be looked at.
        if called:
            raise UnlikeBodyError("each mode has a capture of its own")
        in_eval = request.in_mode("eval")
        direct = take(work, in_eval, Log())
        own = Adapting(work, in_eval, direct, train, taken.controls)
        evaluating = Evaluating(own, _adapted(own, Log()), False, own.base)
        captures += own.captures
        source_eval, eval_base, derived = direct.program, own.base, []
    adapted_eval = extended(EVAL).run(program, evaluating, log)
    special = {name for held in [*derived, *(c.anchor for c in captures if c.anchor)] for name in held.from_two}
    graphs: dict[tuple[Entry, Mode, Stage], Program] = {
        ("forward", "train", "base"): train.base,
        ("forward", "eval", "base"): eval_base,
        ("forward", "train", "adapted"): program,
        ("forward", "eval", "adapted"): adapted_eval,
        ("forward", "train", "source"): source,
        ("forward", "eval", "source"): source_eval,
    }
    for each in graphs.values():
        each.inputs = from_two(each.inputs, special)
    for capture in () if called else captures:
        if not any(capture.program is each for each in graphs.values()):
            graphs["embeds", capture.program.mode, "source"] = capture.program
    adapted_eval.history = list(log.entries)
    return graphs, Resolution(
        _signature(compilation, program, train.base),
        train.structure,
        train.resolved,
        train.trained,
        train.attentions,
        frozenset(everywhere(program.graph, dict.fromkeys(moded(program)))),
        _as_captured(request.axes, source),
        tuple(captures),
        (*(c.anchor for c in captures if c.anchor is not None), *derived),
        (*train.findings.records(ADAPT.name), *evaluating.findings.records(EVAL.name)),
        work.parts,
        tuple(work.notes),
    )


def _adapted(context: Adapting, log: Log) -> Program:
    """A capture's Program, adapted as the spec says, or at the places of another one.

    Raises:
        GraftError: from the passes; GC031 and GC141 where a part of a call cannot be adapted by itself.
    """
    program = (ADAPT_CALLS if context.called else extended(ADAPT)).run(context.base, context, log)
    require_tokens_alone(program)
    require_every_edit(context.compilation, program, context.base)
    return program


def _signature(compilation: Compilation, adapted: Program, base: Program) -> Signature:
    """What tells the calls of a graph from those of others."""
    own = [spec for spec in base.inputs if not is_past(spec.name)]  # heads and their widths are the model's
    bounds = [(f"{s.name}.{i}", low, high) for s in own for i, (low, high) in enumerate(s.ranges)]
    fixed = tuple(f"{axis}={low}" for axis, low, high in bounds if low == high)
    signature = Signature(inputs_of_program(adapted.inputs, adapted.flags), fixed)
    if signature in compilation.signatures:  # for other sizes of the same inputs the model may compute something else
        signature = signature._replace(sizes=(*fixed, *(f"{axis}={low}..{high}" for axis, low, high in bounds)))
    return signature


def _as_captured(axes: Sequence[Axis], source: Program) -> tuple[Axis, ...]:
    """The inputs that were asked for. Of those whose sizes have names of their own, what the graph shows of them: which
    vary, and which are one."""
    shapes = {spec.name: spec.shape for spec in source.inputs}
    return tuple(replace(axis, axes=shapes.get(axis.name, axis.axes)) if axis.as_shown else axis for axis in axes)


def _is_unlike_eval(program: Program) -> bool:
    """Whether something is left in a derived eval graph that eval mode seldom has: random depth and the like leave more
    behind than dropout, and what updates buffers may do so in train mode only."""
    return bool(program.updates) or any(draws(node) for node in program.graph.nodes)
