"""Label both ends of a model (embedding tables and output projections) and the normalisations in between."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.columns import Through
from graftc.compiler.roles.flow import tensor_nodes
from graftc.compiler.roles.operators import PASSING, RESHAPING, beneath
from graftc.passes.core.elements.calls import innermost
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.moves import Move, names_of
from graftc.passes.core.worklist import Worklist
from graftc.specs.claims import SiteKind

_SELECTING = names_of(Move.PICK, Move.GATHER) | {"embedding"}
_SLICING = RESHAPING | names_of(Move.CUT, Move.PICK)
_COUNTING = frozenset({"arange", "cumsum", "linspace"})


def read_ends(labels: Labels, ends: Collection[str] | None = None) -> None:
    """Label the last linear maps before the outputs, and the maps that feed only these.

    A map from which a residual stream starts is not a head, even if the model also returns its result, as is the case
    for the projected features of images.

    Args:
        labels: the labels that receive the roles.
        ends: as for `graftc.compiler.roles.structure.find_structure`.
    """
    output = labels.flow.order[-1]
    heads = [n for n in labels.nearest_linears(output) if not labels.has_role(n) and not labels.in_stream(n)]
    if ends is not None:
        heads = [node for node in heads if innermost(labels.module(node), ends)]
    for head in heads:
        labels.linear("head", labels.flow.linears[head], None, "the last linear map before the output", bare=True)
    for reader in heads:  # maps that feed heads are appended during the loop
        above = labels.nearest(labels.flow.linears[reader].input)
        linear = labels.flow.linears.get(above[0]) if len(above) == 1 else None
        if linear is None or linear.mixes or labels.has_role(linear.node) or _feeds_stream(labels, linear.node):
            continue
        evidence = f"feeds {labels.short(reader)} outside the residual branches"
        labels.linear("head.transform", linear, None, evidence, bare=True)
        heads.append(linear.node)


def _feeds_stream(labels: Labels, node: fx.Node) -> bool:
    return any(labels.flow.is_above(node, r) for r in labels.flow.residuals)


# --- tables --------------------------------------------------------------------------------------------


@dataclass
class _Origin:
    """The origin of the indices that are looked up in a table."""

    inputs: set[str] = field(default_factory=set)
    stored: list[fx.Node] = field(default_factory=list)
    counted: bool = False
    filled: bool = False


def read_tables(labels: Labels) -> None:
    """Label embedding tables by the indices that are looked up in them: token ids or positions."""
    for node in labels.flow.embeddings:
        table = node.args[0]
        if not isinstance(table, fx.Node) or labels.flow.is_data(table):
            continue
        stored = labels.flow.parameters(table)
        parameter = str(stored[0].target) if len(stored) == 1 else None
        if labels.stream and not labels.in_stream(node):
            labels.fail(node, "an embedding table whose rows do not enter the residual stream (relative positions?)")
            continue
        role, why = _table_role(node, table)
        if role:
            labels.add(role, SiteKind.EMBEDDING, node, parameter, why)
        else:
            labels.fail(node, why)
    _added_positions(labels)


def _table_role(node: fx.Node, table: fx.Node) -> tuple[str, str]:
    origin = _origin(node.args[1])
    rows = int(table.meta["val"].shape[0])
    if origin.counted:
        return "embed.position", "looked up by counted positions"
    for name in sorted(origin.inputs):
        if "position" in name:
            return "embed.position", f"looked up by the input {name}"
        if "token_type" in name or "segment" in name:
            return "", f"a table of segments, looked up by the input {name}"
    if origin.inputs:
        return "embed", f"looked up by the input {', '.join(sorted(origin.inputs))}"
    if origin.stored and all(int(s.meta["val"].shape[-1]) <= rows for s in origin.stored):
        return "embed.position", f"looked up by the stored numbers {origin.stored[0].target}"
    return "", "a table looked up by constants that are not positions (segments?)"


def counts_tokens(index: fx.Node) -> bool:
    """Return whether integers come from counting, or from an input that contains positions."""
    origin = _origin(index)
    return origin.counted or any("position" in name for name in origin.inputs)


def _origin(index: object) -> _Origin:
    """Return the origin of integers; for a gather, it is that of the picked values, not of the positions to pick."""
    origin = _Origin()
    nodes = Worklist(tensor_nodes([index]))
    for node in nodes:
        name = op_name(node)
        if node.op == "placeholder":
            origin.inputs.add(node.name)
        elif node.op == "get_attr":
            origin.stored.append(node)
        elif name in _COUNTING:
            origin.counted = True
        else:
            nodes += tensor_nodes(node.args[:1] if name in _SELECTING else node.all_input_nodes)
    return origin


def _added_positions(labels: Labels) -> None:
    """Label stored matrices that are added to a stream before its first branch, with one row per position."""
    flow, seen = labels.flow, 0
    adds = flow.marked(flow.residuals)
    for residual in flow.residuals.values():
        before = flow.up_to(residual.stream)
        if before & adds:
            continue
        for node in flow.nodes(before & ~seen):
            if op_name(node) != "add" or node in flow.residuals:
                continue
            operands = tensor_nodes(node.args[:2])
            for stored, value in (operands, operands[::-1]) if len(operands) == 2 else ():
                matrix = _stored_matrix(stored)
                if matrix is not None and flow.is_data(value):
                    why = "a stored matrix, added to the stream before the first residual branch"
                    labels.add("embed.position", SiteKind.PARAMETER, node, str(matrix.target), why)
        seen |= before


def _stored_matrix(node: fx.Node) -> fx.Node | None:
    stored = beneath(node, PASSING | _SLICING)
    shape: Sequence[Any] = stored.meta["val"].shape if stored.op == "get_attr" else ()
    return stored if len(shape) >= 2 and int(shape[-2]) > 1 else None


# --- normalisations ------------------------------------------------------------------------------------


def read_norms(labels: Labels) -> None:
    """Label normalisation scales, which are arguments of a fused call or are multiplied by a normalised value."""
    for node in labels.flow.order:
        name = op_name(node)
        if name in ("layer_norm", "rms_norm", "native_layer_norm"):
            weight = node.args[2] if len(node.args) > 2 else None
            bias = node.args[3] if len(node.args) > 3 and name != "rms_norm" else None
            stored = weight if isinstance(weight, fx.Node) else bias
            if isinstance(stored, fx.Node):
                labels.add("norm", SiteKind.NORM, node, _vector(stored), f"the scale of {name}")
        elif name == "mul":
            _written_norm(labels, node)


def _written_norm(labels: Labels, node: fx.Node) -> None:
    operands = tensor_nodes(node.args[:2])
    if len(operands) != 2:
        return
    for scale, value in (operands, operands[::-1]):
        marks = labels.columns.through.get(value, Through.NOTHING)
        if not marks & Through.NORMALISED or labels.flow.is_data(scale):
            continue
        parameter = _vector(scale)
        if parameter is not None:
            labels.add("norm", SiteKind.NORM, node, parameter, "scales a value divided by its own deviation")
            return


def _vector(node: fx.Node) -> str | None:
    """Return the name of the stored vector behind ``node``, ignoring casts, reshapes and an added constant."""
    node = beneath(node, PASSING | RESHAPING)
    while op_name(node) == "add" and not isinstance(node.args[1], fx.Node) and isinstance(node.args[0], fx.Node):
        node = beneath(node.args[0], PASSING | RESHAPING)
    return str(node.target) if node.op == "get_attr" and node.meta["val"].dim() == 1 else None
