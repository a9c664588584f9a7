"""Passes that find where to adapt a Program: its roles and sites, and both again with room for virtual tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftc.compiler.adapt.base import take
from graftc.compiler.adapt.context import Adapting
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.partial_graphs import is_encoder, is_part, require_every_place, require_no_virtual_tokens
from graftc.compiler.resolve.called_sites import CalledSites
from graftc.compiler.resolve.compose import check_units, placed, units
from graftc.compiler.resolve.embeds import lengthened, planned, require_token_embeddings
from graftc.compiler.resolve.resolver import Required, Resolver
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.resolve.token_embeddings import token_embeddings
from graftc.compiler.resolve.train import train_sites, train_sites_again
from graftc.compiler.resolve.treated import TreatedUnlikeError, treated_alike
from graftc.compiler.roles.structure import roles_of
from graftc.passes.core.ir.functions import UnlikeBodyError, calls, cut
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.verify import record_baseline
from graftc.passes.core.pass_context import PLACES, SITES
from graftc.passes.core.pipeline import COPIED, Log, Pass, PassGroup
from graftc.specs.errors.diagnostics import GraftError


def _copy(program: Program, context: Adapting) -> Program:
    return program.copy()


def _roles(program: Program, context: Adapting) -> None:
    constants = {name: tensor for capture in context.captures for name, tensor in capture.constants.items()}
    with cut(program.graph):
        context.structure = roles_of(program, constants, encoder=is_encoder(context.base))


def _sites(program: Program, context: Adapting) -> None:
    compilation = context.compilation
    modules = dict(compilation.model.named_modules(remove_duplicate=False))
    vectors = token_embeddings(compilation.model, program)
    table = CalledSites if calls(program.graph) else SiteTable
    context.resolver = Resolver(table(program, compilation.store, context.structure, modules, vectors))


def _resolve(program: Program, context: Adapting) -> None:
    _sites(program, context)
    compilation, resolver, places = context.compilation, context.resolver, context.places
    require_token_embeddings(compilation.spec, compilation.model, resolver.table)
    if places is None:
        context.resolved = resolver.resolve(compilation.spec)
    else:
        edits = compilation.tensor_edits if is_part(context.base) and compilation.signatures else None
        context.resolved = resolver.again(places.resolved, required=_required(context), edits=edits)
    context.plan = planned(units(compilation.spec, context.resolved), resolver.table.token_embeddings)
    require_no_virtual_tokens(context.base, context.plan)
    if context.called:
        _require_alike(program, context)


def _require_alike(program: Program, context: Adapting) -> None:
    """Check that all calls to a body are adapted like the body.

    Raises:
        TreatedUnlikeError: with the groups of layers, if some are adapted differently.
        UnlikeBodyError: for virtual tokens and compositions, which do not support calls.
    """
    if context.plan or any(unit.composition is not None for unit in units(context.compilation.spec, context.resolved)):
        raise UnlikeBodyError("virtual tokens and compositions need layers that are written out")
    groups = treated_alike(context.resolved, calls(program.graph))
    if any(len(alike) > 1 for alike in groups.values()):
        raise TreatedUnlikeError(groups)


def _required(context: Adapting) -> Required:
    """Return which adapted places the Program must contain.

    A place that only train mode reads is adapted only in train mode. A later signature must read every place, since the
    caller could otherwise pass values that an adapted module should compute, such as embeddings. There are two
    exceptions: signatures for generation, which together read all places, and signatures that only leave out inputs,
    such as those for text without images.
    """
    if isinstance(context.places, Adapting) or is_part(context.base):
        return "none"
    shown = {axis.name for axis in context.compilation.main.axes}
    return "called" if {axis.name for axis in context.request.axes} < shown else "all"


def _lengthen(program: Program, context: Adapting) -> Program:
    compilation, plan = context.compilation, context.plan

    def again(axes: Sequence[Axis], flags: Flags) -> Capture:
        return take(context.work, replace(context.request, axes=tuple(axes), flags=flags), Log())

    try:
        base, body = lengthened(compilation.model, context.resolver.table, plan, again)
    except GraftError as error:
        raise placed(compilation.spec, next(iter(plan.values()))[0][0], error) from error
    context.captures.append(body)
    context.base = record_baseline(base)
    return base.copy()


def _resolve_again(program: Program, context: Adapting) -> None:
    _sites(program, context)
    context.resolved = context.resolver.again(context.resolved)


def _resolve_train(program: Program, context: Adapting) -> None:
    compilation, table, places = context.compilation, context.resolver.table, context.places
    if places is None:
        context.trained = train_sites(table, compilation.spec)
        check_units(compilation.spec, units(compilation.spec, context.resolved))
        return
    context.trained = train_sites_again(table, places.trained, every=_required(context) == "all")
    require_every_place(compilation, program, context.resolved, context.trained)


COPY = Pass("copy", _copy, ensures={COPIED})
"""Copy the base, so that it stays unchanged."""

ROLES = Pass("roles", _roles, {COPIED}, {"roles"}, rewrites=False)
"""Detect attention, feed-forward parts and layers from what the graph computes."""

RESOLVE = Pass("resolve", _resolve, {"roles"}, {SITES, PLACES}, rewrites=False)
"""Find the sites that the spec's targets select, or those of the first signature."""

_LENGTHENING = (
    Pass("lengthen", _lengthen),
    ROLES,
    Pass("resolve", _resolve_again, rewrites=False),
)


def _lengthening(program: Program, context: Adapting) -> Sequence[Pass[Adapting]]:
    return _LENGTHENING if context.plan else ()


LENGTHEN = PassGroup("lengthen", _lengthening, {PLACES}, {"room"})
"""Make room for virtual tokens, and find the places again in the longer graph."""

RESOLVE_TRAIN = Pass("resolve train", _resolve_train, {SITES, "room"}, {"trained"}, rewrites=False)
"""Find the parameters that train in place."""
