"""Build Programs for the entry ``embeds``, with room for virtual tokens and with layers that read token embeddings."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import fx, nn

from graftc.compat.operators import UNSAFE_VIEW
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.resolve.compose import Unit
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.resolve.token_embeddings import TokenEmbeddings
from graftc.compiler.roles.findings import Structure
from graftc.compiler.roles.positions import position_readers
from graftc.compiler.roles.structure import find_structure
from graftc.passes.core.build.position_ids import counted_inputs
from graftc.passes.core.ir.program import Program, above
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import ValueSite
from graftc.passes.graph.lengthen import lengthen
from graftc.passes.graph.sequences import Lengthened
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place

_VIEWS = (
    torch.ops.aten.view.default,
    torch.ops.aten.reshape.default,
    UNSAFE_VIEW,
    torch.ops.aten.unflatten.int,
)
_HINT = "use a method that adds no virtual tokens, for example prefix"


Plan: TypeAlias = Mapping[str, Sequence[tuple[Unit, Sequence[ValueSite]]]]
"""For each token-id input, the units that add virtual tokens to its sequence, each with its sites in the sequence."""


def require_token_embeddings(spec: Spec, model: nn.Module, table: SiteTable) -> None:
    """Check that a model accepts token embeddings if a spec has virtual tokens.

    Raises:
        GraftError: GC019 if the spec has virtual tokens but the model does not accept token embeddings.
    """
    given = ", ".join(table.program.signature)
    for index, adaptation in enumerate(spec.adapt):
        if adaptation.virtual_tokens() and not table.token_embeddings:
            message = f"{type(model).__name__} does not accept token embeddings (inputs_embeds) in place of {given}"
            hint = _HINT
            if "inputs_embeds" in table.program.signature:
                message = f"virtual tokens need token ids that the model looks up, but the inputs are {given}"
                hint = "call the model with input_ids"
            raise spec.locate(GraftError("GC019", message, place=Place(path=f"adapt[{index}].method"), hint=hint))


def planned(units: Iterable[Unit], vectors: Sequence[TokenEmbeddings]) -> Plan:
    """Return the units that have virtual tokens, with their sites, by the sequence that they lengthen.

    Raises:
        GraftError: GC019 if a site's sequence cannot be lengthened, GC036 for compositions that cannot have virtual
            tokens.
    """
    plan: dict[str, list[tuple[Unit, list[ValueSite]]]] = {}
    for unit in units:
        for member in unit.members:
            if not member.spec.virtual_tokens():
                continue
            if unit.composition is not None and not unit.of_one_shape:
                kind = unit.composition.kind
                raise GraftError("GC036", f"{member.name!r} adds virtual tokens, which cannot be part of a {kind}")
            sites: dict[str, list[ValueSite]] = {}
            for site, _ in member.sites:
                assert isinstance(site, ValueSite)
                sites.setdefault(_sequence(site, member.sites, vectors).ids, []).append(site)
            for ids, own in sites.items():
                plan.setdefault(ids, []).append((unit, own))
            break
    return plan


def _sequence(
    site: ValueSite, sites: Iterable[tuple[object, object]], vectors: Sequence[TokenEmbeddings]
) -> TokenEmbeddings:
    """Return a site's sequence: the only one from which the first layer of its stack is computed."""
    for own in vectors:
        if own.node is site.node:
            return own
    same = [s for s, _ in sites if isinstance(s, ValueSite) and s.stack == site.stack]
    sources = set(above([min(site.node for site in same)]))
    reached = [own for own in vectors if own.node in sources]
    if len(reached) != 1:
        message = (
            f"{site.key} cannot have virtual tokens: the model does not accept token embeddings in place of token ids"
        )
        raise GraftError("GC019", message, hint=_HINT)
    return reached[0]


def lengthened(
    model: nn.Module,
    table: SiteTable,
    plan: Plan,
    capture: Callable[[Sequence[Axis], Flags], Capture],
) -> tuple[Program, Capture]:
    """Return a Program with room for virtual tokens, and the capture that provides its layers.

    Args:
        model: the source model.
        table: the sites in the model's capture with token ids.
        plan: the virtual tokens to add; see `planned`.
        capture: captures the model with other inputs.

    Raises:
        GraftError: GC019 if the model cannot be captured with token embeddings, or the end of its layers cannot be
            found; GC020 if no room is left for a text.
    """
    program, vectors = table.program, table.token_embeddings
    streams = [
        Lengthened(
            own.ids,
            own.embeds,
            own.node,
            tuple(
                (unit.name, frozenset(s.key for s in sites), tuple(unit.members[0].spec.virtual_tokens()))
                for unit, sites in plan[own.ids]
            ),
        )
        for own in vectors
        if own.ids in plan
    ]
    ends = _ends(table.structure)
    if not ends:
        raise GraftError("GC019", f"could not find the layers of {type(model).__name__}", hint=_HINT)
    axes = _axes(program, streams, list(ends.values()))
    try:
        body = capture(axes, program.flags)
    except GraftError as error:
        if error.code != "GC030":
            raise
        raise GraftError("GC019", f"cannot capture with token embeddings: {error.message}", hint=_HINT) from error
    body_structure = find_structure(body.program.graph, body.constants)
    limits = {stream.ids: _most(body.program, stream, body_structure) for stream in streams}
    for stream in streams:
        _check_room(stream, limits[stream.ids])
    body_ends = _ends(body_structure)
    pairs = [(node, body_ends[stack]) for stack, node in ends.items() if stack in body_ends]
    counted = _counted(program, table.structure, body.program, body_structure)
    return lengthen(program, body.program, streams, pairs, limits, counted), body


def _counted(tokens: Program, structure: Structure, body: Program, own: Structure) -> list[tuple[fx.Node, fx.Node]]:
    """Pair positions counted from ids with those for the same table in the capture with token embeddings."""
    numbers = {name: node for name, node in _positions(tokens, structure).items() if counted_inputs(node)}
    return [(numbers[name], node) for name, node in _positions(body, own).items() if name in numbers]


def _positions(program: Program, structure: Structure) -> dict[str, fx.Node]:
    """Return the nodes with position ids, by the name of the table in which they are looked up."""
    lookups = position_readers(program.graph, structure.findings)
    return {str(lookup.table.target): lookup.numbers for lookup in lookups if lookup.table is not None}


def _ends(structure: Structure) -> dict[str, fx.Node]:
    """Return the output of each stack's last sublayer, with a token axis."""
    return {sublayer.stack: _by_token(sublayer.output) for sublayer in structure.sublayers if sublayer.roles}


def _by_token(value: fx.Node) -> fx.Node:
    """Return a value, or its view with separate row and token axes if a layer has merged these into one."""
    while len(value.users) == 1 and value.meta["val"].dim() < 3:
        (user,) = value.users
        if user.target not in _VIEWS or user.meta["val"].dim() <= value.meta["val"].dim():
            break
        value = user
    return value


def _axes(program: Program, streams: Sequence[Lengthened], ends: Sequence[fx.Node]) -> list[Axis]:
    """Return the inputs that the layers need, with token embeddings instead of ids."""
    needed = set(above(ends))
    by_ids = {stream.ids: stream for stream in streams}
    longer = {s.shape[1]: by_ids[s.name].length for s in program.inputs if s.name in by_ids}
    axes = []
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        if node not in needed:
            continue
        shape = tuple(
            size + longer.get(size, 0) if axis == 1 and isinstance(size, int) else size
            for axis, size in enumerate(spec.shape)
        )
        if spec.name in by_ids:
            value = by_ids[spec.name].value.meta["val"]
            axes.append(Axis(by_ids[spec.name].embeds, value.dtype, (*shape, int(value.shape[-1]))))
        else:
            axes.append(Axis(spec.name, spec.dtype, shape))
    return axes


def _most(body: Program, stream: Lengthened, structure: Structure) -> int | None:
    """Return the maximum number of tokens that the layers can read; None if it is unbounded.

    The bounds are the size ranges of the layers' graph and the sizes of position tables.
    """
    spec = next(spec for spec in body.inputs if spec.name == stream.embeds)
    bounds = [spec.ranges[1][1]] if isinstance(spec.shape[1], str) else []
    node = next(node for node in body.placeholders() if str(node.target) == stream.embeds)
    size = expression(node.meta["val"].shape[1])
    tables = (lookup for lookup in position_readers(body.graph, structure.findings) if lookup.table is not None)
    bounds += [own.size for own in tables if expression(own.numbers.meta["val"].shape[-1]) == size]
    return min((bound for bound in bounds if bound is not None), default=None)


def _check_room(stream: Lengthened, limit: int | None) -> None:
    """Raise GC020 unless the text that the model was captured with fits together with the virtual tokens."""
    text = stream.value.meta["val"].shape[1]
    least = text if isinstance(text, int) else int(text.node.hint)
    if limit is not None and least + stream.length > limit:
        raise GraftError(
            "GC020",
            f"{stream.length} virtual tokens leave no room for a text of {least}: the model reads at most {limit}",
            hint="use fewer virtual tokens, or shorter texts",
        )
