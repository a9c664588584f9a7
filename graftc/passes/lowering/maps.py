"""Recognise, by data flow, matrix products in a graph and low-rank updates of their results."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from graftc.passes.core.ir.cleaning import live
from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import same_type
from graftc.passes.core.ops.plain_projections import Runs
from graftc.passes.lowering.head import linear_of

aten = torch.ops.aten
Step = tuple[fx.Node, list["Branch"], list[fx.Node]]
"""The node of a sum, the updates added in it, and the nodes that are computed for it."""


@dataclass(frozen=True)
class Branch:
    """Two factors applied to a source: ``scale * B A z``.

    Attributes:
        source: the value to which the first factor is applied.
        a, b: the factors.
        scale: the scalar that multiplies the product.
        nodes: the nodes that compute it.
        columns: the indices of the columns to which it is added; None if ``runs`` defines them.
        runs: the same columns as half-open runs; empty for all columns.
    """

    source: fx.Node
    a: fx.Node
    b: fx.Node
    scale: float
    nodes: tuple[fx.Node, ...]
    columns: fx.Node | None = None
    runs: Runs = ()


@dataclass
class Map:
    """A matrix product, and the updates added to its result.

    Attributes:
        node: the product.
        x, weight, bias: the values that it reads.
        transposed: whether the weight is ``[in, out]``.
        end: the node of its result after all updates.
        scale: a scaling factor for each column of its result; None if there are none.
        branches: the updates, in order.
        nodes: all nodes from the product to the end.
    """

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool
    end: fx.Node
    scale: fx.Node | None = None
    branches: list[Branch] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)

    def inputs(self) -> Iterator[fx.Node]:
        """Yield all nodes that it reads."""
        yield from (n for n in (self.x, self.weight, self.bias, self.scale) if n is not None)
        for branch in self.branches:
            yield from (n for n in (branch.source, branch.a, branch.b, branch.columns) if n is not None)


class Matcher:
    """Finds maps in a Program.

    Attributes:
        live: the nodes that are needed.
    """

    def __init__(self, program: Program) -> None:
        self.live = live(program)
        self._settled = Memory(program.graph).settled

    def map(self, node: fx.Node) -> Map | None:
        """Return the map that starts at ``node``; None if ``node`` is not a product with a single matrix."""
        match = _product(node)
        if match is None or not self._settled(node, *node.all_input_nodes):
            return None
        if (rescaled := self._rescaled(match)) is not None:
            return rescaled
        value, branches, nodes = node, [], [node]
        while (step := self._step(value, match.x)) is not None:
            value, added, passed = step
            branches += added
            nodes += passed
        match.end, match.branches, match.nodes = value, branches, nodes
        return match if self._settled(value) else None

    def _rescaled(self, one: Map) -> Map | None:
        """Return the map if its result is rescaled, with at most one update that is already scaled; otherwise None."""
        readers = self.readers(one.node)
        if len(readers) != 1 or readers[0].target is not torch.ops.graftc.rescale.default or readers[0].kwargs:
            return None
        x, scale, delta, *fixed = readers[0].args
        if x is not one.node or fixed != [None, None, True] or not self._settled(one.node):
            return None
        if not isinstance(scale, fx.Node) or scale.meta["val"].shape != (_width(one.node),):
            return None
        branch = None if delta is None else self._branch(delta, one.node, one.x)
        if delta is not None and branch is None:
            return None
        branches = [] if branch is None else [branch]
        nodes = [one.node, readers[0], *(n for b in branches for n in b.nodes)]
        return replace(one, end=readers[0], scale=scale, branches=branches, nodes=nodes)

    def together(self, maps: list[Map]) -> Iterator[list[Map]]:
        """Yield groups of maps of one input that can be computed in one place.

        This place is after everything that they read and before everything that reads them. A single map without an
        update or scale is left out.
        """
        group: list[Map] = []
        for one in maps:
            if group and not self._fits([*group, one]):
                yield from self._worthwhile(group)
                group = []
            group.append(one)
        yield from self._worthwhile(group)

    def _worthwhile(self, group: list[Map]) -> Iterator[list[Map]]:
        if self._fits(group) and (len(group) > 1 or group[0].branches or group[0].scale is not None):
            yield group

    def _fits(self, group: list[Map]) -> bool:
        inside = {node for one in group for node in (*one.nodes, *(n for b in one.branches for n in b.nodes))}
        given = [n for one in group for n in one.inputs() if n.op != "get_attr"]
        read = [u for one in group for u in self.readers(one.end)]
        # Maps that read only tensors, as in a prefix's network, run once rather than for every token.
        return bool(read and given) and not inside.intersection(given) and max(given) < min(read)

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """Return the needed nodes that read a value."""
        return [user for user in node.users if user in self.live]

    def _step(self, value: fx.Node, x: fx.Node) -> Step | None:
        """Return the next sum after a value: its node, the updates that it adds, and the nodes in between."""
        readers = self.readers(value)
        if not self._settled(value):
            return None
        if len(readers) == 1 and (branch := self.added(readers[0], value, x)) is not None:
            return readers[0], [branch], [readers[0], *branch.nodes]
        return self._indexed(value, readers, x) or self._in_columns(value, readers, x)

    def added(self, node: fx.Node, value: fx.Node, x: fx.Node) -> Branch | None:
        """Return the update that a sum adds to a value; None if it is not a product of two factors."""
        if node.target is not aten.add.Tensor or node.kwargs or len(node.args) != 2 or not _alike(node, value):
            return None
        others = [argument for argument in node.args if argument is not value]
        return self._branch(others[0], value, x) if len(others) == 1 else None

    def _branch(self, node: Any, value: fx.Node, x: fx.Node) -> Branch | None:
        """Return ``node`` as a product of two factors if it is one and can be added to ``value``; otherwise None."""
        if not self._own(node, aten.linear.default) or not _alike(node, value):
            return None
        hidden, b = _operands(node)
        nodes, scale = [node], 1.0
        if self._own(hidden, aten.mul.Tensor):
            numbers = [v for v in hidden.args if isinstance(v, int | float)]
            factors = [v for v in hidden.args if isinstance(v, fx.Node)]
            if len(numbers) != 1 or len(factors) != 1:
                return None
            nodes.append(hidden)
            scale, hidden = float(numbers[0]), factors[0]
        if not self._own(hidden, aten.linear.default):
            return None
        source, a = _operands(hidden)
        if a is None or b is None or not _alike(source, x) or not self._settled(source, a, b):
            return None
        return Branch(source, a, b, scale, (*nodes, hidden))

    def _own(self, node: Any, target: Any) -> bool:
        """Return whether a value is a call of an operator and has exactly one reader."""
        return isinstance(node, fx.Node) and node.target is target and len(self.readers(node)) == 1

    def _indexed(self, value: fx.Node, readers: list[fx.Node], x: fx.Node) -> Step | None:
        """Match a sum over columns that are selected by index and then replaced with the sum."""
        picked = next((n for n in readers if n.target is aten.index_select.default), None)
        put = next((n for n in readers if n.target is aten.index_copy.default), None)
        if picked is None or put is None or len(readers) != 2 or len(put.args) != 4:
            return None
        _, axis, columns, total = put.args
        same = picked.args == (value, axis, columns) and put.args[0] is value and _is_last(value, axis)
        if not same or not self._own(total, aten.add.Tensor) or len(self.readers(picked)) != 1:
            return None
        assert isinstance(total, fx.Node) and isinstance(columns, fx.Node)
        branch = self.added(total, picked, x)
        if branch is None:
            return None
        return put, [replace(branch, columns=columns)], [picked, total, put, *branch.nodes]

    def _in_columns(self, value: fx.Node, readers: list[fx.Node], x: fx.Node) -> Step | None:
        """Match sums over columns when all columns are sliced out and then concatenated again."""
        if not readers or any(node.target is not aten.slice.Tensor for node in readers):
            return None
        passed: set[fx.Node] = set()
        pending = list(readers)
        while pending and len(passed) < _MOST:
            node = pending.pop(0)
            if node.target is aten.cat.default and _alike(node, value):
                return self._put_together(node, value, x)
            if node not in passed and node.target in _COLUMN_WISE:
                passed.add(node)
                pending += self.readers(node)
        return None

    def _put_together(self, node: fx.Node, value: fx.Node, x: fx.Node) -> Step | None:
        columns = _Columns(self, value, x)
        parts = columns.of(node)
        if parts is None or not all(columns.seen.issuperset(self.readers(n)) for n in columns.seen - {node}):
            return None
        branches = _in_runs(parts, columns.branches)
        if branches is None:
            return None
        return node, branches, [*columns.seen - {value}, *(n for b in branches for n in b.nodes)]


_MOST = 64
"""The maximum number of nodes that are examined for one sum."""

_PRODUCTS = (aten.linear.default, aten.addmm.default)
_COLUMN_WISE = frozenset({aten.slice.Tensor, aten.cat.default, aten.add.Tensor})


@dataclass(frozen=True)
class _Part:
    """A range of columns of a value, possibly with an addition.

    Attributes:
        start, end: the range of columns.
        added: the node of the sum that adds to these columns; None if there is no addition.
        at: the column of the addition that is added to column ``start``.
    """

    start: int
    end: int
    added: fx.Node | None = None
    at: int = 0


class _Columns:
    """Traces the composition of values, column by column.

    Attributes:
        seen: the nodes that were visited.
        branches: the updates added to some columns, by the node of the sum.
    """

    def __init__(self, matcher: Matcher, value: fx.Node, x: fx.Node) -> None:
        self._matcher, self._value, self._x = matcher, value, x
        self.seen: set[fx.Node] = set()
        self.branches: dict[fx.Node, Branch] = {}

    def of(self, node: Any) -> list[_Part] | None:
        """Return the columns of the value that a node consists of, in order; None if it has other columns."""
        if not isinstance(node, fx.Node):
            return None
        self.seen.add(node)
        if node is self._value:
            return [_Part(0, _width(node))]
        if node.target is aten.slice.Tensor and len(node.args) == 4 and _is_last(node, node.args[1]):
            return self._cut(node)
        if node.target is aten.cat.default and len(node.args) == 2 and _is_last(node, node.args[1]):
            parts = [self.of(source) for source in node.args[0]]  # type: ignore[union-attr]
            return None if None in parts else [part for some in parts for part in some or ()]
        if node.target is aten.add.Tensor and len(node.args) == 2 and isinstance(node.args[0], fx.Node):
            parts_of = self.of(node.args[0])
            branch = self._matcher.added(node, node.args[0], self._x)
            if parts_of is None or branch is None or any(part.added is not None for part in parts_of):
                return None
            self.branches[node] = branch
            sizes = [part.end - part.start for part in parts_of]
            starts = [sum(sizes[:i]) for i in range(len(sizes))]
            return [_Part(p.start, p.end, node, at) for p, at in zip(parts_of, starts, strict=True)]
        return None

    def _cut(self, node: fx.Node) -> list[_Part] | None:
        source, _, start, end = node.args
        parts = self.of(source)
        if parts is None or not (isinstance(start, int) and isinstance(end, int)) or start < 0 or end < 0:
            return None
        selected, at = [], 0
        for part in parts:
            first, last = max(start - at, 0), min(end - at, part.end - part.start)
            if first < last:
                selected.append(_Part(part.start + first, part.start + last, part.added, part.at + first))
            at += part.end - part.start
        return selected


def _in_runs(parts: list[_Part], branches: dict[fx.Node, Branch]) -> list[Branch] | None:
    """Return the updates with the runs of columns to which they apply; None if any column is out of place."""
    at = 0
    runs: dict[fx.Node, list[tuple[int, int]]] = {}
    taken: dict[fx.Node, int] = {}
    for part in parts:
        if part.start != at:
            return None
        at = part.end
        if part.added is not None:
            if taken.get(part.added, 0) != part.at:
                return None
            runs.setdefault(part.added, []).append((part.start, part.end))
            taken[part.added] = part.at + part.end - part.start
    if any(taken[node] != _width(node) for node in taken) or runs.keys() != branches.keys():
        return None
    return [replace(branches[node], runs=tuple(runs[node])) for node in sorted(runs)]


def _product(node: fx.Node) -> Map | None:
    """Return a matrix product, in the base or in an adaptation, as a map; None for other nodes."""
    linear = linear_of(node) if node.target in _PRODUCTS and not node.kwargs else None
    if linear is None:
        return None
    x, weight, bias, transposed = linear
    if bias is not None and tuple(bias.meta["val"].shape) != (node.meta["val"].shape[-1],):
        return None
    return Map(node, x, weight, bias, transposed, node)


def _operands(node: fx.Node) -> tuple[Any, fx.Node | None]:
    """Return the input and weight of a product; the weight is None unless the product is plain and without a bias."""
    x, weight, *rest = node.args
    plain = not node.kwargs and not any(rest) and isinstance(weight, fx.Node) and weight.meta["val"].dim() == 2
    return x, weight if plain else None  # type: ignore[return-value]


def _alike(node: Any, other: fx.Node) -> bool:
    """Return whether two values are tensors of the same shape and dtype."""
    return isinstance(node, fx.Node) and same_type(node.meta["val"], other.meta["val"])


def _is_last(node: fx.Node, axis: Any) -> bool:
    return axis in (-1, node.meta["val"].dim() - 1)


def _width(node: fx.Node) -> int:
    return int(node.meta["val"].shape[-1])
