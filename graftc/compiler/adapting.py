"""Create the Programs of one signature by running passes in order."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

from graftc.compiler.adapt.base import anchored, take
from graftc.compiler.adapt.calls import CALLS
from graftc.compiler.adapt.context import Adapting, Work
from graftc.compiler.adapt.evaluate import EVALUATE, Evaluating
from graftc.compiler.adapt.insert import ADAPTATIONS, ADDED_TOKENS, CONTROLS, RECOMPUTE, TRAIN_IN_PLACE
from graftc.compiler.adapt.places import COPY, LENGTHEN, RESOLVE, RESOLVE_TRAIN, ROLES
from graftc.compiler.capture.anchor import Anchor
from graftc.compiler.capture.as_captured import draws
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.isolation import seldom_collected
from graftc.compiler.capture.signature import Axis, inputs_of_program
from graftc.compiler.compilation import Compilation
from graftc.compiler.partial_graphs import require_every_edit, require_tokens_alone
from graftc.compiler.resolution import CalledResolution, Graphs, Resolution
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
"""Turns a captured base that has been compared with the model into an adapted Program."""

ADAPT_CALLS = Pipeline(ADAPT.name, [*ADAPT.passes, CALLS], ADAPT.given)
"""Turns a capture whose repeated layers are function calls into the adapted train-mode Program."""

EVAL: Pipeline[Evaluating] = Pipeline("eval", [EVALUATE], {"adapted"})
"""Turns an adapted Program into its eval-mode counterpart."""


def adapt_signature(work: Work) -> tuple[Graphs, Resolution]:
    """Capture one signature and adapt it.

    The first signature determines which places are adapted; the others adapt the same places.
    """
    with progress.working("compiling", type(work.compilation.source).__name__), seldom_collected():
        log = Log()
        capture = take(work, work.request, log)
        checked = log.entries[len(capture.traced.history) :]
        adapted = _with_calls(work, capture, checked) if may_call(work, capture) else None
        return _adapt(work, capture, checked) if adapted is None else adapted


def may_call(work: Work, capture: Capture) -> bool:
    """Return whether layers of a capture may remain function calls.

    This requires that some layers are function calls, and that nothing in the spec or in a plugin applies to the whole
    model.
    """
    if work.compilation.every_layer:
        return False
    spec, function_calls = work.compilation.spec, calls(capture.traced.graph)
    plain = not (work.controls or spec.tokens or spec.train or spec.compose) and spec.cloze is None
    return (
        plain
        and bool(function_calls)
        and all(layer_path(one.path) == one.path for one in function_calls)
        and not added_passes()
    )


def _with_calls(work: Work, capture: Capture, checked: Sequence[HistoryEntry]) -> tuple[Graphs, Resolution] | None:
    """Adapt a capture whose repeated layers are calls; return None if every layer has to be written out.

    Errors in a spec are not raised here but later, for the written-out graphs, so that their messages name the same
    places in either case.

    Args:
        work: the work on the signature.
        capture: the capture, which has been compared with the source model.
        checked: history entries of that comparison.
    """
    compilation = work.compilation

    def adapted(program: Program) -> tuple[Graphs, Resolution]:
        with _added_or_not(compilation.store):
            return _adapt(replace(work, parts={}), replace(capture, traced=program), checked, called=True)

    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                graphs, resolution = adapted(capture.traced)
            except TreatedUnlikeError as unlike:
                graphs, resolution = adapted(record_baseline(split(capture.traced, unlike.groups)))
    except (UnlikeBodyError, GraftError):
        return None
    for each in caught:
        again(each)
    initial, anchors = Initial(compilation.seed, narrow=compilation.narrow), resolution.anchors

    def write_out() -> tuple[Graphs, Resolution]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _adapt(replace(work, initial=initial, parts={}, notes=[]), capture, checked, anchors=anchors)

    return graphs, CalledResolution(replace(resolution, captures=(capture,)), write_out)


@contextmanager
def _added_or_not(store: Store) -> Iterator[None]:
    """Run a block in which adaptations add tensors, and remove these tensors if the block raises.

    Otherwise, methods that look for their own tensors would mistake those of a failed attempt for trained ones.
    """
    before = {name for name, _ in store.adapters()}
    try:
        yield
    except Exception:
        added = [name for name, _ in store.adapters() if name not in before]
        for name in added:
            store.drop(name)
        raise


def _adapt(
    work: Work,
    main: Capture,
    checked: Sequence[HistoryEntry],
    *,
    called: bool = False,
    anchors: Sequence[Anchor] = (),
) -> tuple[Graphs, Resolution]:
    """Adapt a train-mode capture, and either derive the eval-mode graphs from it or capture eval mode as well.

    Args:
        work: the work on the signature.
        main: the capture, which has been compared with the source model.
        checked: history entries of that comparison.
        called: whether equal layers are function calls.
        anchors: existing comparisons of both modes' graphs with the model, if any.
    """
    compilation, request = work.compilation, work.request
    train = Adapting(work, request, main, work.places, called)
    source = train.base
    log = Log([*source.history, *checked])
    program = _adapted(train, log)
    program.history = list(log.entries)
    captures, source_eval = list(train.captures), to_eval(source)
    eval_base = record_baseline(source_eval if train.base is source else to_eval(train.base))
    derived = [anchor for anchor in anchors if anchor.mode == "eval"]
    if not anchors:
        derived = [
            anchored(compilation, c, source_eval if c is main else to_eval(c.program), request.axes)
            for c in train.captures
        ]
    evaluating = Evaluating(train, program, True, eval_base)
    if _is_unlike_eval(eval_base) or not all(comparison.passed for comparison in derived):
        # Eval mode differs from train mode by more than dropout, so it needs a capture of its own.
        if called:
            raise UnlikeBodyError("each mode has a capture of its own")
        in_eval = replace(request, mode="eval")
        direct = take(work, in_eval, Log())
        eval_adapting = Adapting(work, in_eval, direct, train)
        evaluating = Evaluating(eval_adapting, _adapted(eval_adapting, Log()), False, eval_adapting.base)
        captures += eval_adapting.captures
        source_eval, eval_base, derived = direct.program, eval_adapting.base, []
    adapted_eval = extended(EVAL).run(program, evaluating, log)
    special = {
        name for comparison in [*derived, *(c.anchor for c in captures if c.anchor)] for name in comparison.from_two
    }
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
    """Return a capture's Program, adapted as the spec requests or at the same places as another graph.

    Raises:
        GraftError: any error from the passes; GC031 or GC141 if a part of a call cannot be adapted on its own.
    """
    program = (ADAPT_CALLS if context.called else extended(ADAPT)).run(context.base, context, log)
    require_tokens_alone(program)
    require_every_edit(context.compilation, program, context.base)
    return program


def _signature(compilation: Compilation, adapted: Program, base: Program) -> Signature:
    """Return a graph's signature, which distinguishes the calls that it serves from those of other graphs."""
    own = [spec for spec in base.inputs if not is_past(spec.name)]  # the model fixes the heads of a past
    bounds = [(f"{s.name}.{i}", low, high) for s in own for i, (low, high) in enumerate(s.ranges)]
    fixed = tuple(f"{axis}={low}" for axis, low, high in bounds if low == high)
    signature = Signature(inputs_of_program(adapted.inputs, adapted.flags), fixed)
    if signature in compilation.signatures:  # the model may behave differently for other sizes of the same inputs
        signature = signature._replace(sizes=(*fixed, *(f"{axis}={low}..{high}" for axis, low, high in bounds)))
    return signature


def _as_captured(axes: Sequence[Axis], source: Program) -> tuple[Axis, ...]:
    """Return the requested inputs, with the captured graph's axes for those captured as shown.

    These axes indicate which sizes are dynamic and which are equal.
    """
    shapes = {spec.name: spec.shape for spec in source.inputs}
    return tuple(replace(axis, axes=shapes.get(axis.name, axis.axes)) if axis.as_shown else axis for axis in axes)


def _is_unlike_eval(program: Program) -> bool:
    """Return whether a derived eval graph contains something that is unusual in eval mode.

    Unlike dropout, stochastic depth and similar techniques leave traces in the graph, and the model may update buffers
    only in train mode.
    """
    return bool(program.updates) or any(draws(node) for node in program.graph.nodes)
