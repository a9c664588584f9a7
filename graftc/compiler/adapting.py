"""One signature's Programs: captured, rewritten and verified, step by step."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from graftc.compiler import progress
from graftc.compiler.cached import (
    is_encoder,
    is_part,
    require_every_edit,
    require_every_place,
    require_no_virtual_tokens,
    require_tokens_alone,
)
from graftc.compiler.capture.anchor import Anchor, anchor
from graftc.compiler.capture.as_captured import draws, random_structure
from graftc.compiler.capture.cache import captured, forget, keep
from graftc.compiler.capture.capture import Capture, capture
from graftc.compiler.capture.interface import Flags, dtype_of
from graftc.compiler.capture.isolation import seldom_collected
from graftc.compiler.capture.signature import Axis, inputs_of_program
from graftc.compiler.capture.untraced import unkept
from graftc.compiler.compilation import Compilation, Resolution
from graftc.compiler.resolve.compose import Unit, add_controls, check_units, insert_unit, placed, units
from graftc.compiler.resolve.embeds import Plan, lengthened, planned, require_token_embeddings
from graftc.compiler.resolve.resolver import Resolved, Resolver
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.resolve.token_embeddings import token_embeddings
from graftc.compiler.resolve.tokens import TOKENS, token_sites
from graftc.compiler.resolve.train import TRAIN, insert_train, train_sites, train_sites_again
from graftc.compiler.roles.structure import Structure, find_structure
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.seams import Seams
from graftc.passes.core.ir.effects import flaw
from graftc.passes.core.ir.eval_mode import moded, to_eval
from graftc.passes.core.ir.history import Changes, HistoryEntry, Recorder
from graftc.passes.core.ir.past_inputs import is_past
from graftc.passes.core.ir.program import Program, from_two
from graftc.passes.core.ir.program_key import Entry, Mode, Signature, Stage
from graftc.passes.core.ir.verify import record_baseline, verify
from graftc.passes.core.method.folding import fold_at
from graftc.passes.core.method.insertion import insert_at, prepare
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import Applied, AttentionSite, LinearSite, ParameterSite
from graftc.passes.graph.added_tokens import insert_tokens
from graftc.passes.graph.gather_early import gather_early
from graftc.passes.methods.sparse_products import recompute_weights
from graftc.specs.errors.diagnostics import GraftError, first_line, warn


class _Clock:
    """Times the steps of one Program's compilation and writes its history."""

    def __init__(self) -> None:
        self.entries: list[HistoryEntry] = []
        self._recorder: Recorder | None = None

    def step(self, name: str, run: Callable[[], Any], program: Program) -> Any:
        """Run a step that changes a graph, and give what it gives: a new Program, several things of which the first is
        one, or anything else where it changes ``program`` in place."""
        progress.step(name)
        if self._recorder is None or self._recorder.graph is not program.graph:
            self._recorder = Recorder(program.graph)
        started = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - started
        first = result[0] if isinstance(result, tuple) and result else result
        after = first if isinstance(first, Program) else program
        self.entries.append(self._recorder.entry(name, after.graph, seconds))
        return result

    def look(self, name: str, run: Callable[[], Any]) -> Any:
        """Run a step that changes no graph, and give what it gives."""
        progress.step(name)
        started = time.perf_counter()
        result = run()
        self.entries.append(HistoryEntry(name, 0, 0, time.perf_counter() - started, Changes()))
        return result


Graphs = dict[tuple[Entry, Mode, Stage], Program]
"""The Programs of one signature."""


def adapt_signature(
    compilation: Compilation, axes: Sequence[Axis], flags: Flags, controls: Sequence[str] = ()
) -> tuple[Graphs, Resolution]:
    """Capture one signature and adapt it; the first one says which places are adapted, others adapt the same ones.

    Args:
        compilation: what it belongs to.
        axes, flags: the inputs and flags of the source model.
        controls: inputs beside these, which choose among adaptations.
    """
    with progress.working("compiling", type(compilation.source).__name__), seldom_collected():
        return _adapt_signature(compilation, axes, flags, controls)


def _adapt_signature(
    compilation: Compilation, axes: Sequence[Axis], flags: Flags, controls: Sequence[str]
) -> tuple[Graphs, Resolution]:
    clock = _Clock()
    found = _capture(compilation, axes, flags, "train", clock)
    base = found.program
    main = compilation.main if compilation.signatures else None
    train = _adapted(compilation, found, clock, main, controls)
    train.program.history = list(clock.entries)
    captures, source_eval = list(train.captures), to_eval(base)
    eval_base = record_baseline(source_eval if train.base is base else to_eval(train.base))
    derived = [_anchored(compilation, c, source_eval if c is found else to_eval(c.program)) for c in train.captures]
    if _is_unlike_eval(eval_base) or not all(held.passed for held in derived):
        # Eval mode is more than train mode without dropout: what it computes has to be looked at.
        direct = _capture(compilation, axes, flags, "eval", _Clock())
        own = _adapted(compilation, direct, _Clock(), train, controls)
        captures += own.captures
        source_eval, eval_base, derived = direct.program, own.base, []
        adapted_eval = clock.step("mode(eval)", lambda: to_eval(own.program, base=False), train.program)
    else:
        adapted_eval = clock.step("mode(eval)", lambda: to_eval(train.program), train.program)
    adapted_eval.baseline = eval_base.baseline
    special = {name for held in [*derived, *(c.anchor for c in captures if c.anchor)] for name in held.from_two}
    graphs: Graphs = {
        ("forward", "train", "base"): train.base,
        ("forward", "eval", "base"): eval_base,
        ("forward", "train", "adapted"): train.program,
        ("forward", "eval", "adapted"): adapted_eval,
        ("forward", "train", "source"): base,
        ("forward", "eval", "source"): source_eval,
    }
    for program in graphs.values():
        program.inputs = from_two(program.inputs, special)
    for each in captures:
        if not any(each.program is program for program in graphs.values()):
            graphs["embeds", each.program.mode, "source"] = each.program
    clock.look("verify", lambda: verify(adapted_eval, compilation.store, "mode(eval)", types=True))
    adapted_eval.history = list(clock.entries)
    return graphs, Resolution(
        _signature(compilation, train.program, train.base),
        train.structure,
        train.resolved,
        train.trained,
        train.attentions,
        frozenset(moded(train.program)),
        tuple(axes),
        tuple(captures),
        (*(c.anchor for c in captures if c.anchor is not None), *derived),
    )


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


def _capture(compilation: Compilation, axes: Sequence[Axis], flags: Flags, mode: Mode, clock: _Clock) -> Capture:
    """The source model's graph, verified and held against the model.

    Raises:
        GraftError: GC041 where they differ.
    """
    found = captured(
        compilation.model,
        axes,
        flags,
        mode=mode,
        canonical=compilation.store.aliases,
        use_cache=compilation.use_cache,
        known=compilation.known,
    )
    if found.cached or found.alike:
        try:
            found = _checked(compilation, found, axes, clock)
        except Exception as error:  # such a graph is no better than one for which every layer has to be traced
            kept = found.cached
            found = _captured_anew(compilation, found, axes, flags, mode, clock)
            if kept:
                found.notes += (f"the graph that was kept for this model was captured anew: {first_line(error)}",)
    else:
        found = _checked(compilation, found, axes, clock)
    _note(compilation, found)
    if compilation.spec.cloze is not None:
        clock.step("gather early", lambda: record_baseline(gather_early(found.program)), found.program)
        clock.look("verify", lambda: verify(found.program, compilation.store, "gather early"))
    for name in sorted(found.program.updates):
        compilation.store.own(name, compilation.values.get(name))
    return found


def _captured_anew(
    compilation: Compilation, stale: Capture, axes: Sequence[Axis], flags: Flags, mode: Mode, clock: _Clock
) -> Capture:
    """A capture in the place of a kept one that is not the model's graph; the cache has it from then on."""
    model = compilation.model
    if compilation.use_cache:
        forget(model, axes, flags, mode)
    fresh = capture(model, axes, flags=flags, mode=mode, canonical=compilation.store.aliases, alike=False)
    fresh = _checked(compilation, replace(fresh, key=stale.key), axes, clock)
    if compilation.use_cache:
        keep(model, axes, fresh)
    return fresh


def _checked(compilation: Compilation, found: Capture, axes: Sequence[Axis], clock: _Clock) -> Capture:
    """A capture with its anchor.

    Raises:
        GraftError: GC030 where it writes to what it may not, GC040 where it is not a graph of the Store's tensors,
            GC041 where it is not the model.
    """
    store, program = compilation.store, record_baseline(found.program)
    clock.entries = list(program.history)
    added = [name for name in found.constants if name not in store]
    for name in added:
        store.add_constant(name, found.constants[name])
    try:
        write = flaw(program.graph, program.mode, store.is_buffer)
        if write is not None:
            message = f"{type(compilation.source).__name__} cannot be adapted: at {write[0].name} {write[1]}"
            raise GraftError("GC030", message, hint="a forward may change buffers in train mode, and nothing else")
        clock.look("verify", lambda: verify(program, store, "canonicalise"))
        comparison = _anchored(compilation, found, program)
        untried = ("it was not held against all kinds of inputs",) if comparison.plain else ()
        differing = comparison.differing or untried
        if differing and (comparison.differing or found.cached):
            where = f"{comparison.mode} mode with {comparison.inputs}"
            message = f"the graph of {type(compilation.model).__name__} is not the model: in {where}, {differing[0]}"
            raise GraftError("GC041", message, hint=_NOT_THE_MODEL, details=differing[1:5])
    except Exception:
        for name in added:
            store.drop_constant(name)
        raise
    program.inputs = from_two(program.inputs, comparison.from_two)
    return replace(found, anchor=comparison)


def _anchored(compilation: Compilation, found: Capture, program: Program) -> Anchor:
    """A graph, captured or derived from one that was, held against the source model."""
    progress.step(f"anchor({program.mode})")
    axes = [Axis(spec.name, spec.dtype, spec.shape) for spec in program.inputs]
    return anchor(compilation.model, program, found.constants, axes, compilation.store.aliases)


_NOT_THE_MODEL = "what forward decides by values or keeps outside of tensors and buffers has no place in a graph"


def _note(compilation: Compilation, found: Capture) -> None:
    """Say what of the model a graph does not have, each once."""
    assigned = [*found.assigned, *(found.anchor.assigned if found.anchor is not None else ())]
    written = [f"forward assigns to {name}" for name in assigned]
    drawn = random_structure(compilation.model)
    lost = unkept(compilation.model)
    new = [note for note in dict.fromkeys([*found.notes, *drawn, *written, *lost]) if note not in compilation.notes]
    compilation.notes += new
    for note in new:
        if note in written:
            hint = "what it read there is a constant of the graph; keep what changes in buffers, or return it"
            warn("GC042", f"{type(compilation.model).__name__}'s {note}, which its graph does not", hint=hint)
        elif note in lost:
            warn("GC049", note, hint="its graph has the gradients and the state that capturing it shows")
        elif note in drawn:
            warn("GC047", note, hint="set it to what is wanted before compiling, so that nobody misses it")


@dataclass
class _Adapted:
    """An adapted Program and what was found in it."""

    program: Program
    structure: Structure
    resolved: list[Resolved]
    trained: list[ParameterSite]
    base: Program
    captures: tuple[Capture, ...]
    attentions: tuple[AttentionSite, ...]


def _adapted(
    compilation: Compilation, found: Capture, clock: _Clock, main: Resolution | _Adapted | None, controls: Sequence[str]
) -> _Adapted:
    """A capture's Program, adapted as the spec says, or at the places of ``main``."""
    spec, store, base = compilation.spec, compilation.store, found.program
    program = clock.step("copy", base.copy, base)
    alone = is_encoder(base)
    structure = clock.look("roles", lambda: find_structure(program.graph, found.constants, encoder=alone))
    resolver = _resolver(compilation, program, structure)
    edits = compilation.tensor_edits if is_part(base) and compilation.signatures else None
    require_token_embeddings(spec, compilation.model, resolver.table)
    # What train mode alone reads is adapted there alone; another signature has to read every place, or be one of those
    # that generating goes through, which read them together.
    every = not isinstance(main, _Adapted) and not is_part(base)
    resolved = clock.look(
        "resolve",
        lambda: resolver.resolve(spec) if main is None else resolver.again(main.resolved, every=every, edits=edits),
    )
    plan = planned(units(spec, resolved), resolver.table.token_embeddings)
    captures = [found]
    require_no_virtual_tokens(base, plan)
    if plan:
        base, body = clock.step(
            "lengthen", lambda: _lengthened(compilation, found.program.mode, resolver.table, plan), program
        )
        captures.append(body)
        record_baseline(base)
        clock.look("verify", lambda: verify(base, store, "lengthen"))
        program = base.copy()
        constants = {**found.constants, **body.constants}
        structure = clock.look("roles", lambda: find_structure(program.graph, constants, encoder=alone))
        resolver = _resolver(compilation, program, structure)
        resolved = clock.look("resolve", lambda: resolver.again(resolved))
    table = resolver.table
    trained = clock.look(
        "resolve train",
        lambda: train_sites(table, spec) if main is None else train_sites_again(table, main.trained, every=every),
    )
    if main is None:
        check_units(spec, units(spec, resolved))
    else:
        require_every_place(compilation, program, resolved, trained)
    if controls:
        dtype = dtype_of(compilation.model)
        clock.step("insert controls", lambda: add_controls(program, spec, controls, dtype), program)
    if spec.tokens is not None:
        _insert_tokens(compilation, program, resolver.table, clock)
    _insert(compilation, program, trained, resolved, clock)
    require_tokens_alone(program)
    require_every_edit(compilation, program, base)
    attentions = tuple(s for sites in resolver.table.entries for s in sites if isinstance(s, AttentionSite))
    return _Adapted(program, structure, resolved, trained, base, tuple(captures), attentions)


def _resolver(compilation: Compilation, program: Program, structure: Structure) -> Resolver:
    model = compilation.model
    modules = dict(model.named_modules(remove_duplicate=False))
    return Resolver(SiteTable(program, compilation.store, structure, modules, token_embeddings(model, program)))


def _lengthened(compilation: Compilation, mode: Mode, table: SiteTable, plan: Plan) -> tuple[Program, Capture]:
    """A base with room for virtual tokens, and the capture that its layers come from."""

    def capture(axes: Sequence[Axis], flags: Flags) -> Capture:
        return _capture(compilation, axes, flags, mode, _Clock())

    try:
        return lengthened(compilation.model, table, plan, capture)
    except GraftError as error:
        raise placed(compilation.spec, next(iter(plan.values()))[0][0], error) from error


def _insert_tokens(compilation: Compilation, program: Program, table: SiteTable, clock: _Clock) -> None:
    spec, store = compilation.spec, compilation.store
    assert spec.tokens is not None
    build = _builder(compilation, program, TOKENS, TOKENS)
    try:
        found = token_sites(compilation.model, store, table, spec.tokens)
    except GraftError as error:
        raise spec.locate(error) from error
    for rows, sites in found:
        clock.step("insert(tokens)", partial(insert_tokens, build, sites, rows), program)
    _collect(compilation, build)
    clock.look("verify", lambda: verify(program, store, "insert(tokens)"))


def _insert(
    compilation: Compilation,
    program: Program,
    trained: Sequence[ParameterSite],
    resolved: Sequence[Resolved],
    clock: _Clock,
) -> None:
    store = compilation.store
    if trained:
        build = _builder(compilation, program, TRAIN, TRAIN)
        clock.step("insert(train)", lambda: insert_train(build, trained), program)
        _collect(compilation, build)
        clock.look("verify", lambda: verify(program, store, "insert(train)"))
    # Each of the first ones by itself, so that the one to blame is named; then only when the graph has doubled.
    every, pending, verified = list(units(compilation.spec, resolved)), list[str](), 0
    for number, unit in enumerate(every):
        clock.step(f"insert({unit.name})", partial(_insert_unit, compilation, program, unit), program)
        pending.append(unit.name)
        if number < _VERIFIED_EACH or unit is every[-1] or len(program.graph.nodes) >= 2 * verified:
            stage = f"insert({' to '.join(dict.fromkeys((pending[0], pending[-1])))})"
            clock.look("verify", partial(verify, program, store, stage))
            pending, verified = [], len(program.graph.nodes)
    if program.graph.find_nodes(op="call_function", target=torch.ops.graftc.sparse_weight.default):
        build = _builder(compilation, program, "", "")
        clock.step("recompute", lambda: recompute_weights(build), program)
        clock.look("verify", lambda: verify(program, store, "recompute"))


_VERIFIED_EACH = 8
"""Adaptations behind each of which a graph is verified."""


def _builder(
    compilation: Compilation, program: Program, adaptation: str, method: str, seams: Seams | None = None
) -> Builder:
    given = program, compilation.store, adaptation, method, compilation.seed, compilation.values
    return Builder(*given, seams=seams, narrow=compilation.narrow)


def _insert_unit(compilation: Compilation, program: Program, unit: Unit) -> None:
    def new(name: str, method: str, seams: Seams | None = None) -> Builder:
        return _builder(compilation, program, name, method, seams)

    if unit.composition is not None:
        for owner, parts in insert_unit(unit, program, compilation.spec, new, _adapt).items():
            compilation.parts.setdefault(owner, {}).update(parts)
        return
    (item,) = unit.members
    if not item.sites:
        return
    build = new(item.name, item.spec.method)
    try:
        _adapt(build, item)
    except GraftError as error:
        raise placed(compilation.spec, unit, error) from error
    _collect(compilation, build)


def _adapt(build: Builder, item: Resolved) -> None:
    method = method_for(item.spec.method)
    shared = prepare(item.spec, [site for site, _ in item.sites], build)
    for site, spec in item.sites:
        insert_at(spec, site, shared, build)
        if isinstance(site, LinearSite):
            parts = {**build.parts.get(None, {}), **build.parts.get(site.key, {})}
            site.applied.append(Applied(item.name, partial(fold_at, method, spec, site), parts))


def _collect(compilation: Compilation, build: Builder) -> None:
    compilation.parts.setdefault(build.adaptation, {}).update(build.parts)
