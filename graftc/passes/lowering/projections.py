"""Fuse linear maps of one input, and their low-rank updates, into one call to `graftc.passes.core.ops.projections`.

A map is recognised by its computation: a matrix product, followed by additions of products of two factors, over all or
some of its columns. Maps that read the same value in the same layer are computed together, including those without
updates: their contributions to the value's gradient are then accumulated in one tensor.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from itertools import takewhile
from typing import Any

import torch
from torch import fx

from graftc.passes.core.grouping import grouped
from graftc.passes.core.ir.cleaning import live
from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.printer import target_name
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.ops.projections import projections
from graftc.passes.lowering.maps import Map, Matcher
from graftc.records.graphs import LoweringOutcome

STEP = "projections"


def fuse_projections(program: Program) -> list[LoweringOutcome]:
    """Compute maps of one input together, and add updates to their results in place.

    Returns:
        For every site at a product with a weight, whether the insertion there became part of a fused call.
    """
    matcher = Matcher(program)
    maps = filter(None, (matcher.map(node) for node in program.graph.nodes if node in matcher.live))
    groups = grouped(maps, lambda one: (one.x, layer_path(one.node.meta.get("module", ""))))
    chosen = [group for members in groups.values() for group in matcher.together(members)]
    passed = {node for group in chosen for one in group for node in one.nodes}
    outcomes = [outcome for edit in program.edits if (outcome := _outcome(edit, program.edits, passed)) is not None]
    replaced = {before: after for group in chosen for before, after in _replace(program, group, matcher).items()}
    _erase(program, replaced)
    return outcomes


def _replace(program: Program, group: list[Map], matcher: Matcher) -> dict[fx.Node, fx.Node]:
    """Replace a group with one call, and return the node of each map's new result, by the node of its old one."""
    graph, x = program.graph, group[0].x
    branches = [(number, branch) for number, one in enumerate(group) for branch in one.branches]
    sources = list(dict.fromkeys(branch.source for _, branch in branches if branch.source is not x))
    places = {source: place for place, source in enumerate([x, *sources])}
    factors = tuple((branch.a, branch.b, branch.columns) for _, branch in branches)
    updates = tuple((number, places[branch.source], branch.scale, branch.runs) for number, branch in branches)
    masks = [_mask(source, group, matcher) for source in sources]
    given = tuple(source if mask is None else mask[0] for source, mask in zip(sources, masks, strict=True))
    dropped = tuple(None if mask is None else mask[1] for mask in masks)
    weights = tuple((one.weight, one.bias, one.scale) for one in group)
    transposed = tuple(one.transposed for one in group)
    arguments: tuple[Any, ...] = (x, given, weights, factors, transposed, updates, dropped)
    with graph.inserting_before(min(user for one in group for user in matcher.readers(one.end))):
        call = graph.call_function(projections, arguments)
        results = [graph.call_function(operator.getitem, (call, number)) for number in range(len(group))]
    for tensor in call.all_input_nodes:
        if tensor.op == "get_attr" and tensor > call:
            call.prepend(tensor)
    module = _common(str(one.node.meta.get("module", "")) for one in group)
    origin = next(filter(None, (provenance(node) for one in group for node in one.nodes)), None)
    common = {"module": module} | ({} if origin is None else {"custom": {"graftc": {**origin, "part": STEP}}})
    call.meta = {"val": tuple(one.end.meta["val"] for one in group), **common}
    for one, result in zip(group, results, strict=True):
        result.meta = {**one.end.meta, **common}
        one.end.replace_all_uses_with(result)
    return {one.end: result for one, result in zip(group, results, strict=True)}


def _mask(source: fx.Node, group: list[Map], matcher: Matcher) -> tuple[fx.Node, float] | None:
    """Return the mask and probability of the dropout if a source is the group's input after dropout.

    Return None if the source is anything else, or if other nodes read it as well.
    """
    if source.target is not torch.ops.graftc.masked_dropout.default or source.kwargs or len(source.args) != 3:
        return None
    x, mask, p = source.args
    inside = {node for one in group for node in one.nodes}
    if x is not group[0].x or not isinstance(mask, fx.Node) or not isinstance(p, float):
        return None
    return (mask, p) if inside.issuperset(matcher.readers(source)) else None


def _erase(program: Program, replaced: dict[fx.Node, fx.Node]) -> None:
    """Erase nodes that are no longer needed, and keep the edits whose nodes remain."""
    needed = live(program)
    for node in reversed(list(program.graph.nodes)):
        if node not in needed:
            program.graph.erase_node(node)
    edits = program.edits.mapped(lambda node: replaced.get(node, node))
    program.edits = Edits(edit for edit in edits if edit.before in needed and edit.after in needed)


def _common(paths: Iterable[str]) -> str:
    """Return the innermost module path that is equal to, or a parent of, all these paths."""
    segments = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(names[0] for names in takewhile(lambda names: len(set(names)) == 1, segments))


def _outcome(edit: Edit, edits: Edits, passed: set[fx.Node]) -> LoweringOutcome | None:
    """Return the outcome for an edit; None if it does not apply to a product with a weight."""
    product = edits.original(edit.before)
    if edit.narrow or target_name(product.target) not in _PRODUCTS:
        return None
    if edit.after in passed:
        return LoweringOutcome(STEP, edit.site, True)
    reason = _PRODUCTS[target_name(product.target)]
    if not reason:
        kind = target_name(edit.after.target)
        reason = _KINDS.get(kind, f"{kind} is not a sum with a product of two factors, or its parts are read elsewhere")
    return LoweringOutcome(STEP, edit.site, False, reason)


_PRODUCTS = {
    "aten.linear": "",
    "aten.addmm": "",
    "aten.mm": "a product without a bias that is stored by columns",
    "aten.matmul": "a product of two values",
    **dict.fromkeys(("aten.bmm", "aten.baddbmm", "aten._grouped_mm", "transformers.grouped_mm_fallback"), "experts"),
    **dict.fromkeys(("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution"), "a convolution"),
    "aten.embedding": "an embedding table",
}
"""Operators that apply a weight, with the reason why their sites are left unchanged; empty if they can be fused."""

_KINDS = {
    "aten.mul.Tensor": "the result is scaled",
    "graftc.rescale": "rows of the weight are rescaled in a map with a bias or with dropout on its input",
}
"""Why a site is left unchanged, by the operator that replaces its result."""
