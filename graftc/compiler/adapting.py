"""One signature's Programs: which passes make them, in order."""

from __future__ import annotations

from collections.abc import Sequence

from graftc.compiler.adapt.base import anchored, take
from graftc.compiler.adapt.context import Adapting, Work
from graftc.compiler.adapt.evaluate import EVALUATE, Evaluating
from graftc.compiler.adapt.insert import ADAPTATIONS, ADDED_TOKENS, CONTROLS, RECOMPUTE, TRAIN_IN_PLACE
from graftc.compiler.adapt.places import COPY, LENGTHEN, RESOLVE, RESOLVE_TRAIN, ROLES
from graftc.compiler.cached import require_every_edit, require_tokens_alone
from graftc.compiler.capture.as_captured import draws
from graftc.compiler.capture.isolation import seldom_collected
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import inputs_of_program
from graftc.compiler.compilation import Compilation, Graphs, Resolution
from graftc.passes.core import progress
from graftc.passes.core.added_passes import extended
from graftc.passes.core.ir.eval_mode import moded, to_eval
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program import Program, from_two
from graftc.passes.core.ir.program_key import Entry, Mode, Signature, Stage
from graftc.passes.core.ir.verify import record_baseline
from graftc.passes.core.pipeline import Log, Pipeline

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
    main = compilation.main if compilation.signatures else None
    train = Adapting(work, request, found, main, controls)
    program = _adapted(train, log)
    program.history = list(log.entries)
    captures, source_eval = list(train.captures), to_eval(found.program)
    eval_base = record_baseline(source_eval if train.base is found.program else to_eval(train.base))
    derived = [anchored(compilation, c, source_eval if c is found else to_eval(c.program)) for c in train.captures]
    evaluating = Evaluating(train, program, True, eval_base)
    if _is_unlike_eval(eval_base) or not all(held.passed for held in derived):
        # Eval mode is more than train mode without dropout: what it computes has to be looked at.
        in_eval = request.in_mode("eval")
        direct = take(work, in_eval, Log())
        own = Adapting(work, in_eval, direct, train, controls)
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
        ("forward", "train", "source"): found.program,
        ("forward", "eval", "source"): source_eval,
    }
    for each in graphs.values():
        each.inputs = from_two(each.inputs, special)
    for capture in captures:
        if not any(capture.program is each for each in graphs.values()):
            graphs["embeds", capture.program.mode, "source"] = capture.program
    adapted_eval.history = list(log.entries)
    return graphs, Resolution(
        _signature(compilation, program, train.base),
        train.structure,
        train.resolved,
        train.trained,
        train.attentions,
        frozenset(moded(program)),
        request.axes,
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
    program = extended(ADAPT).run(context.base, context, log)
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


def _is_unlike_eval(program: Program) -> bool:
    """Whether something is left in a derived eval graph that eval mode seldom has: random depth and the like leave more
    behind than dropout, and what updates buffers may do so in train mode only."""
    return bool(program.updates) or any(draws(node) for node in program.graph.nodes)
