"""Column indices: the sources, and their output columns, of which each value of a graph consists.

The graph is run on small ``int64`` tensors. A source (a linear map, an embedding, attention, a residual add)
produces ``source << 32 | column``. Shape operators actually run on these indices, so heads may be split, interleaved,
repeated or permuted in any way; elementwise operators pass on their first tracked operand; normalisations pass columns
through; statistics are untracked. Only the nearest sources that reach a value are recorded, as a bit set. The column
operations that similar layers share are computed once (`patterns`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from enum import IntFlag
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.roles.flow import Flow, tensor_nodes, view_chain
from graftc.compiler.roles.indices import distinct, varying
from graftc.compiler.roles.maps import columns_along
from graftc.compiler.roles.operators import (
    CREATING,
    NONLINEAR,
    NORMALISING,
    PASSING,
    POINTWISE,
    POOLING,
    RESIZING,
    SHAPING,
)
from graftc.compiler.roles.patterns import Indexed, Patterns, T, hashable
from graftc.passes.core.ir.past_inputs import is_cross, is_past
from graftc.passes.core.ir.program import map_nodes, nodes_in
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.moves import BREAKS, HOLE, Move, move_of, moved
from graftc.passes.core.worklist import Worklist


class Through(IntFlag):
    """The kinds of operation between a value's nearest sources and the value."""

    NOTHING = 0
    NONLINEAR = 1
    NORM = 2
    ROTARY = 4
    STATISTIC = 8
    ROOT = 16
    NORMALISED = 32


_MARKS: Mapping[Through, Collection[str]] = {
    Through.NONLINEAR: NONLINEAR,
    Through.ROTARY: ("cos", "sin"),
    Through.NORM: NORMALISING,
    Through.STATISTIC: ("mean", "var", "var_mean", "sum", "linalg_vector_norm", "norm"),
}
"""The operators of each kind, except where the kind depends on the operands."""


class Columns:
    """The propagated indices of one graph.

    Attributes:
        sources: the source nodes; a node's position is its number in bit sets and indices.
        number: the number of each source node.
        front: the nearest sources that reach each node, as a bit set.
        through: the operations between these sources and each node.
        cached: whether the graph has inputs for keys and values of earlier tokens.
    """

    def __init__(self, flow: Flow, constants: Mapping[str, Tensor]) -> None:
        self.flow = flow
        self.constants = constants
        self.sources: list[fx.Node] = []
        self.number: dict[fx.Node, int] = {}
        self.front: dict[fx.Node, int] = {}
        self.through: dict[fx.Node, Through] = {}
        self.failures: list[fx.Node] = []
        self.cached = False
        self._index: dict[fx.Node, Indexed] = {}
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._columns: dict[fx.Node, dict[int, Tensor]] = {}
        self._known: dict[fx.Node, Tensor | None] = {}
        self._writes = any(op_name(n) in ("copy", "index_put", "slice_scatter") for n in flow.order)
        self._patterns = Patterns(shared=not self._writes)
        sources = {*flow.linears, *flow.attentions, *flow.residuals, *flow.convolutions, *flow.embeddings}
        with torch.no_grad():
            for node in flow.order:
                self._visit(node, node in sources)

    # --- reading ---------------------------------------------------------------------------------------

    def columns(self, node: fx.Node) -> dict[int, Tensor]:
        """Return the sorted columns of each source that ``node`` contains, by source number."""
        if node not in self._columns:
            index, sources = self.index(node), self._index[node].sources if node in self._index else None
            by_source = {} if index is None else self.once(distinct, index)
            self._columns[node] = by_source if sources is None else {sources[at]: own for at, own in by_source.items()}
        return self._columns[node]

    def tracked(self, node: fx.Node) -> bool:
        """Return whether the column indices of ``node`` are known."""
        return self.index(node) is not None

    def index(self, node: fx.Node) -> Tensor | None:
        """Return the column indices of ``node``, or None if unknown; sources stay distinct and in order."""
        indexed = self._index.get(node)
        return None if indexed is None else indexed.index

    def once(self, function: Callable[[Tensor], T], index: Tensor) -> T:
        """Return a function's result for some indices, computed once for all values that share them."""
        return self._patterns.once((function, id(index)), (index,), lambda: function(index))

    def shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return a tensor node's shape at the chosen sizes; a shape with an empty axis counts as a failure."""
        if node not in self._shapes:
            self._shapes[node] = self.flow.sizes.shape(node.meta["val"])
            if any(size < 1 for size in self._shapes[node]):
                self.failures.append(node)
        return self._shapes[node]

    # --- propagation -----------------------------------------------------------------------------------

    def _visit(self, node: fx.Node, is_source: bool) -> None:
        value = node.meta.get("val")
        if node.op == "placeholder" and is_past(str(node.target)) and not is_cross(str(node.target)):
            # Keys and values of earlier tokens have the same columns as those of the tokens that follow them.
            self.front[node], self.through[node], self.cached = 0, Through.NOTHING, True
            return
        if is_source or (node.op == "placeholder" and isinstance(value, Tensor) and value.is_floating_point()):
            self._source(node)
            return
        front, through = 0, Through.NOTHING
        for source in node.all_input_nodes if not isinstance(value, torch.SymInt | int) else ():
            front |= self.front.get(source, 0)
            through |= self.through.get(source, Through.NOTHING)
        name = op_name(node)
        self.front[node], self.through[node] = front, self._path(node, name, through)
        if node.op != "call_function" or not isinstance(value, Tensor | list | tuple):
            return
        try:
            indexed = self._run(node, name)
        except BREAKS:
            # Sizes that break an operator reveal nothing about columns: the value stays untracked and is not guessed.
            self.failures.append(node)
            return
        if indexed is not None:
            self._index[node] = indexed

    def _source(self, node: fx.Node) -> None:
        number = self.number[node] = len(self.sources)
        self.sources.append(node)
        self.front[node] = 1 << number
        self.through[node] = Through.NOTHING
        if isinstance(node.meta.get("val"), Tensor):
            shape = self.shape(node)
            if shape and min(shape) >= 0:
                axes = self._axes(node, shape)
                own = self._patterns.once(("source", shape, axes), (), lambda: columns_along(shape, axes))
                self._index[node] = self._patterns.source(own, number)

    def _axes(self, node: fx.Node, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the axes along which a source's columns are counted, from its weight or, for an add, its operands."""
        if node in self.flow.linears:
            return self.flow.linears[node].axes
        if node in self.flow.residuals:
            for operand in (self.flow.residuals[node].stream, self.flow.residuals[node].branch):
                index = self.index(operand)
                axes = self.once(varying, index) if index is not None and index.shape == shape else ()
                if len(axes) == 1:
                    return axes
        return (-1,)

    def _path(self, node: fx.Node, name: str, through: Through) -> Through:
        if name in ("mul", "div"):
            return self._product(node, through)
        is_root = name in ("rsqrt", "sqrt", "reciprocal") or (name == "pow" and node.args[1] in (0.5, -0.5))
        if is_root and through & Through.STATISTIC:
            return through | Through.ROOT
        return through | next((mark for mark, names in _MARKS.items() if name in names), Through.NOTHING)

    def _product(self, node: fx.Node, through: Through) -> Through:
        """Return the marks of a product.

        A value times its own inverse deviation is normalised; another scale ends the pattern.
        """
        operands = tensor_nodes(node.args[:2])
        if len(operands) != 2:
            return through
        marks = [self.through.get(n, Through.NOTHING) for n in operands]
        for value, other in ((0, 1), (1, 0)):
            if marks[other] & Through.ROOT and not marks[value] & Through.ROOT and self.tracked(operands[value]):
                return through & ~(Through.ROOT | Through.STATISTIC) | Through.NORMALISED | Through.NORM
        if any(not self.flow.is_data(n) for n in operands):
            return through & ~Through.NORMALISED
        return through

    def _run(self, node: fx.Node, name: str) -> Indexed | None:
        if name == "copy" and self._writes:
            return self._copy(node)
        if name in CREATING:
            written = self._writes and self._is_written(node)
            return Indexed(torch.full(self.shape(node), HOLE), None) if written else None
        first = node.args[0] if node.args else None
        if name == "index_copy":
            return self._put(node)
        move = move_of(node)
        if move in (Move.PICK, Move.GATHER):
            return self._of_first(node, self._rowwise)
        if move is not None:
            return self._moved(node, move)
        if name in PASSING or name in NORMALISING:
            return self._index.get(first) if isinstance(first, fx.Node) else None
        if name == "view_as_complex" or name == "view_as_real":
            return self._of_first(node, lambda _, index: self.once(_COMPLEX[name], index))
        if name in POOLING:
            return self._of_first(node, self._pooled)
        if name in RESIZING or node in self.flow.depthwise:
            return self._of_first(node, self._resized)
        target = node.target
        tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
        if torch.Tag.pointwise in tags or name in POINTWISE:
            return self._pointwise(node)
        return None

    def _put(self, node: fx.Node) -> Indexed | None:
        """Return the indices of tokens that are written into a cache, whose own columns are the same."""
        whole, axis, _, new = node.args
        if not (isinstance(whole, fx.Node) and whole.op == "placeholder" and isinstance(new, fx.Node)):
            return None
        index = self.index(new)
        if index is None or not isinstance(axis, int) or axis % index.dim() in self.once(varying, index):
            return None
        return Indexed(index.narrow(axis, 0, 1).expand(self.shape(node)), self._index[new].sources)

    def _of_first(self, node: fx.Node, run: Callable[[fx.Node, Tensor], Tensor | None]) -> Indexed | None:
        """Return the indices that `run` computes from those of the first operand.

        If an operator has several results, those after the first, such as positions, are left untracked.
        """
        indexed = self._index.get(node.args[0])  # type: ignore[arg-type]
        if indexed is None or indexed.index is None:
            return None
        result = run(node, indexed.index)
        if result is None:
            return None
        value = node.meta["val"]
        several = isinstance(value, list | tuple)
        return Indexed((result, *(None for _ in value[1:])) if several else result, indexed.sources)

    def _moved(self, node: fx.Node, move: Move) -> Indexed | None:
        """Return the operator's own result for the indices, if the columns of at least one operand are known."""
        if move in (Move.COPY, Move.CAST):
            return self._index.get(node.args[0])  # type: ignore[arg-type]
        operands = node.all_input_nodes if move in (Move.JOIN, Move.FILL) else nodes_in(node.args[:1])
        if all(n not in self._index for n in operands):
            return None
        indexed = {n: self._index[n] for n in node.all_input_nodes if n in self._index}
        sources = self._patterns.together(indexed.values())
        patterns = {n: self._patterns.among(own, sources) for n, own in indexed.items()}

        def operand(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                if leaf in patterns:
                    return patterns[leaf]
                if isinstance(value := leaf.meta.get("val"), Tensor):
                    return torch.full(self.shape(leaf), HOLE)
                leaf = value
            return self.flow.sizes.size(leaf)

        def known(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node) and leaf in patterns:
                return id(patterns[leaf])
            if isinstance(leaf, fx.Node) and isinstance(leaf.meta.get("val"), Tensor):
                return "hole", self.shape(leaf)
            return "size", operand(leaf)

        key = (node.target, hashable(node.args, known), hashable(node.kwargs, known))
        result = self._patterns.once(key, patterns.values(), lambda: moved(node, operand))
        return None if result is None else Indexed(result, sources)

    def _pointwise(self, node: fx.Node) -> Indexed | None:
        shape = self.shape(node)
        for source in node.all_input_nodes:
            index = self.index(source)
            if index is not None:
                indexed = self._index[source]
                return indexed if index.shape == shape else Indexed(self._expanded(index, shape), indexed.sources)
        return None

    def _expanded(self, index: Tensor, shape: tuple[int, ...]) -> Tensor:
        return self._patterns.once(("expanded", shape, id(index)), (index,), lambda: index.expand(shape))

    def _pooled(self, node: fx.Node, index: Tensor) -> Tensor | None:
        """Return the indices after pooling, which keeps columns if all pooled entries have the same ones."""
        if len(node.args) < 2:
            return None
        dims = node.args[1] if isinstance(node.args[1], list | tuple) else [node.args[1]]
        places = {d % index.dim() for d in dims if isinstance(d, int)}
        if len(places) < len(dims) or not places or places & set(self.once(varying, index)):
            return None
        shape = self._first_shape(node)
        for place in sorted(places, reverse=True):
            index = index.narrow(place, 0, 1) if len(shape) == index.dim() else index.select(place, 0)
        return index.expand(shape)

    def _first_shape(self, node: fx.Node) -> tuple[int, ...]:
        """Return the shape of a node's result, or of its first result if it has several."""
        value = node.meta["val"]
        return self.flow.sizes.shape(value[0]) if isinstance(value, list | tuple) else self.shape(node)

    def _resized(self, node: fx.Node, index: Tensor) -> Tensor | None:
        """Return the indices after a resize, which keeps columns if sizes change only along other axes."""
        shape = self._first_shape(node)
        if len(shape) != index.dim() or not index.numel():
            return None
        axes = self.once(varying, index)
        if len(axes) > 1 or any(shape[a] != index.shape[a] for a in axes):
            return None
        for axis in set(range(len(shape))) - set(axes):
            index = index.narrow(axis, 0, 1)
        return index.expand(shape)

    def _rowwise(self, node: fx.Node, index: Tensor) -> Tensor | None:
        """Return the indices after picking rows, which keeps columns if all rows have the same ones."""
        shape = self.shape(node)
        # If the positions to pick are known, the operator itself picks the indices.
        picked: Tensor | None = moved(node, lambda leaf: index if leaf is node.args[0] else self._numbers(leaf))
        if picked is not None:
            return picked
        if not shape or not index.numel():
            return None
        if op_name(node) in ("gather", "index_select") and isinstance(node.args[1], int):
            touched = node.args[1] % index.dim()
            return None if touched in self.once(varying, index) else self._resized(node, index)
        if index.shape[-1] != shape[-1] or _touches_last(node, index.dim()):
            return None
        row = index.reshape(-1, index.shape[-1])[0]
        return row.expand(shape) if torch.equal(index, row.expand_as(index)) else None

    def _numbers(self, node: Any) -> Tensor | int | None:
        """Return the value of an integer node if it depends only on sizes and known constants."""
        value = node.meta.get("val") if isinstance(node, fx.Node) else node
        if not isinstance(value, Tensor):
            return self.flow.sizes.size(value) if isinstance(value, torch.SymInt | int) else None
        if node not in self._known:
            self._known[node] = None if value.is_floating_point() else self._computed(node)
        return self._known[node]

    def _computed(self, node: fx.Node) -> Tensor | None:
        if node.op == "get_attr":
            constant = self.constants.get(str(node.target))
            return constant if constant is not None and constant.device.type != "meta" else None
        if node.op != "call_function" or self.flow.is_data(node) or not callable(node.target):
            return None
        known = {n: self._numbers(n) for n in node.all_input_nodes}
        if any(v is None for v in known.values()):
            return None
        result = node.target(*map_nodes(node.args, known.__getitem__), **map_nodes(node.kwargs, known.__getitem__))
        return result if isinstance(result, Tensor) and result.device.type != "meta" else None

    def _is_written(self, node: fx.Node) -> bool:
        nodes = Worklist([node])
        for current in nodes:
            if any(op_name(user) == "copy" for user in current.users):
                return True
            nodes += (user for user in current.users if op_name(user) in SHAPING)
        return False

    def _copy(self, node: fx.Node) -> Indexed | None:
        """Write into the indices of a view's base tensor, as the graph writes into the tensor."""
        target, source = node.args[0], node.args[1]
        assert isinstance(target, fx.Node) and isinstance(source, fx.Node)
        index, written = self.index(target), self.index(source)
        if index is not None and written is not None and index.shape == written.expand_as(index).shape:
            index.copy_(written)
        for base in view_chain(target):
            self.front[base] = self.front.get(base, 0) | self.front.get(source, 0)
            self.through[base] = self.through.get(base, Through.NOTHING) | self.through.get(source, Through.NOTHING)
        return self._index[target] if index is not None else None


_COMPLEX: Mapping[str, Callable[[Tensor], Tensor]] = {
    # Doubles represent every index exactly, so a complex number can hold two of them.
    "view_as_complex": lambda index: torch.view_as_complex(index.double().contiguous()),
    "view_as_real": lambda index: torch.view_as_real(index.resolve_conj()).round().long(),
}


def _touches_last(node: fx.Node, rank: int) -> bool:
    """Return whether an indexing operator picks along the last axis of an operand with this rank."""
    if len(node.args) < 2:
        return True
    dims = node.args[1]
    return not isinstance(dims, list | tuple) or (len(dims) == rank and dims[-1] is not None)
