"""Passes that adapt a Program at its places: controls, added tokens, parameters that train in place, adaptations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from graftc.compiler.adapt.context import Adapting
from graftc.compiler.capture.interface import dtype_of
from graftc.compiler.resolve.compose import Unit, add_controls, insert_unit, placed, units
from graftc.compiler.resolve.moved import nodes_within
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.resolve.tokens import TOKENS, token_sites
from graftc.compiler.resolve.train import TRAIN, insert_train
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.program import Program
from graftc.passes.core.method.folding import fold_at
from graftc.passes.core.method.insertion import insert_at, prepare
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.pipeline import Pass, PassGroup
from graftc.passes.core.sites.sites import Applied, LinearSite, Site
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.graph.added_tokens import insert_tokens
from graftc.passes.graph.sparse_products import recompute_weights
from graftc.specs.errors.diagnostics import GraftError


def _controls(program: Program, context: Adapting) -> None:
    add_controls(program, context.compilation.spec, context.work.controls, dtype_of(context.compilation.model))


def _tokens(program: Program, context: Adapting) -> Sequence[Pass[Adapting]]:
    compilation = context.compilation
    spec = compilation.spec
    if spec.tokens is None:
        return ()
    build = context.builder(program, TOKENS, TOKENS)
    another_element = compilation.whole is not None and TOKENS in compilation.parts
    table = context.resolver.table
    try:
        tables = token_sites(compilation.model, compilation.store, table, spec.tokens, optional=another_element)
    except GraftError as error:
        raise spec.locate(error) from error

    def insert(program: Program, context: Adapting, sites: list[LinearSite], rows: WeightSlice) -> None:
        insert_tokens(build, sites, rows)
        context.work.enter(build.adaptation, build.parts)

    return [Pass("insert(tokens)", partial(insert, sites=sites, rows=rows)) for rows, sites in tables]


def _train(program: Program, context: Adapting) -> None:
    build = context.builder(program, TRAIN, TRAIN)
    insert_train(build, context.trained)
    context.work.enter(build.adaptation, build.parts)


def _adaptations(program: Program, context: Adapting) -> Sequence[Pass[Adapting]]:
    every = units(context.compilation.spec, context.resolved)
    return [Pass(f"insert({unit.name})", partial(_insert, unit=unit)) for unit in every]


def _insert(program: Program, context: Adapting, unit: Unit) -> None:
    if unit.composition is not None:
        builder = partial(context.builder, program)
        for owner, parts in insert_unit(unit, program, context.compilation.spec, builder, adapt).items():
            context.work.enter(owner, parts)
        return
    (item,) = unit.members
    insert_single(program, context, unit, item, lambda site: not context.is_called(site))


def insert_single(
    program: Program, context: Adapting, unit: Unit, item: Resolved, here: Callable[[Site], bool]
) -> None:
    """Insert an adaptation that is not part of a composition.

    Objects that its method creates for all sites together are created only once if they contain no nodes.

    Args:
        program: the Program, changed in place.
        context: records the tensors.
        unit: the adaptation's unit in the spec.
        item: the adaptation with all of its sites.
        here: returns whether to insert at a site in this Program.
    """
    if not item.sites:
        return
    build = context.builder(program, item.name, item.spec.method)
    try:
        if item.name in context.prepared:
            shared = context.prepared[item.name]
        else:
            before = _size(build)
            shared = prepare(item.spec, [site for site, _ in item.sites], build)
            if _size(build) == before and not nodes_within(shared):
                context.prepared[item.name] = shared
        _insert_at_sites(build, item, shared, here)
    except GraftError as error:
        raise placed(context.compilation.spec, unit, error) from error
    context.work.enter(build.adaptation, build.parts)
    context.starts.update(build.starts)


def _size(build: Builder) -> tuple[int, ...]:
    """Return the counts of everything that a method may create for all of its sites."""
    program = build.program
    return len(program.graph.nodes), len(program.edits), len(program.tensor_edits), len(build.parts)


def adapt(build: Builder, item: Resolved) -> None:
    """Insert an adaptation at all of its sites, after preparing everything that the sites share."""
    shared = prepare(item.spec, [site for site, _ in item.sites], build)
    _insert_at_sites(build, item, shared, lambda site: True)


def _insert_at_sites(build: Builder, item: Resolved, shared: Any, here: Callable[[Site], bool]) -> None:
    method = method_for(item.spec.method)
    for site, spec in item.sites:
        if not here(site):
            continue
        insert_at(spec, site, shared, build)
        if isinstance(site, LinearSite):
            parts = {**build.parts.get(None, {}), **build.parts.get(site.key, {})}
            site.applied.append(Applied(item.name, partial(fold_at, method, spec, site), parts))


def _recompute(program: Program, context: Adapting) -> None:
    recompute_weights(context.builder(program, "", ""))


def _has_sparse_weights(program: Program, context: Adapting) -> bool:
    return bool(program.graph.find_nodes(op="call_function", target=torch.ops.graftc.sparse_weight.default))


CONTROLS = Pass(
    "insert controls",
    _controls,
    {"places"},
    {"controls"},
    wanted=lambda program, context: bool(context.work.controls),
)
"""Add the inputs with which a call chooses among adaptations."""

ADDED_TOKENS = PassGroup("insert tokens", _tokens, {"sites", "room"}, {"tokens"}, each=0)
"""Replace the tables' rows for added tokens by trained rows."""

TRAIN_IN_PLACE = Pass(
    "insert(train)",
    _train,
    {"trained"},
    {"trained in place"},
    wanted=lambda program, context: bool(context.trained),
    verified=True,
)
"""Let base parameters train, through copies that replace them."""

ADAPTATIONS = PassGroup("insert", _adaptations, {"places", "controls", "tokens", "trained in place"}, {"adapted"})
"""Insert every adaptation and every composition at its places."""

RECOMPUTE = Pass("recompute", _recompute, {"adapted"}, wanted=_has_sparse_weights, verified=True)
"""Compute sums of a weight and a sparse delta where they are read, and recompute them in the backward pass."""
