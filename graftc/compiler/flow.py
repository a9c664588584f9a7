"""What flows into what in one graph: ancestors, weights in use, attentions and residual adds.

Nothing here reads a model type, a class or a parameter's name: a weight is what depends on no input, an attention is
a fused call or a softmax between two products, a residual add joins a value with something computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graftc.compiler.operators import (
    CONVOLUTIONS,
    MOVING,
    PASSING,
    PRODUCTS,
    RESHAPING,
    SOFTMAX,
    VIEWING,
    WRITING,
    op_name,
)
from graftc.passes.core.shapes import Sizes

_SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Linear:
    """One use of a weight: ``y = x W^T``.

    Attributes:
        node, input, weight: the call, what it reads, and the weight's node (a parameter, or shape operators on one).
        parameter: name of the parameter in it, None where none can be told.
        out: how many output columns.
        experts: whether the weight is 3-D, one matrix per expert.
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    parameter: str | None
    out: int
    experts: bool = False


@dataclass(frozen=True)
class Attention:
    """One attention: a fused call, or the product of a softmax with the values."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    name: str


@dataclass(frozen=True)
class Residual:
    """One residual add: ``node = stream + branch``, where the branch is computed from the stream."""

    node: fx.Node
    stream: fx.Node
    branch: fx.Node


def bits(mask: int) -> Iterator[int]:
    """Positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def tensor_nodes(values: Iterable[Any]) -> list[fx.Node]:
    """The nodes among ``values`` that hold a tensor."""
    return [v for v in values if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), torch.Tensor)]


def view_chain(node: fx.Node) -> list[fx.Node]:
    """A tensor and the ones that it is a view of, nearest first."""
    chain = [node]
    while op_name(chain[-1]) in VIEWING and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


class Flow:
    """Facts of one graph that need no values.

    Attributes:
        order, at: nodes in graph order, and each one's position; bit sets count positions.
        above: per node, all its ancestors, as a bit set.
        data: nodes that depend on the values (not only the sizes) of an input, as a bit set.
        linears, attentions, residuals, convolutions, embeddings: what was recognised, by node in graph order.
    """

    def __init__(self, graph: fx.Graph, sizes: Sizes) -> None:
        self.sizes = sizes
        self.order: list[fx.Node] = list(graph.nodes)
        self.at: dict[fx.Node, int] = {node: i for i, node in enumerate(self.order)}
        self.above: list[int] = []
        self.data = 0
        self.linears: dict[fx.Node, Linear] = {}
        self.attentions: dict[fx.Node, Attention] = {}
        self.residuals: dict[fx.Node, Residual] = {}
        self.convolutions: list[fx.Node] = []
        self.embeddings: list[fx.Node] = []
        self._ancestors()
        for node in self.order:
            if node.op == "call_function":
                self._recognise(node)
        working = [*self.linears, *self.attentions, *self.convolutions]
        self._scoring: set[fx.Node] = set()
        for node in self.order:
            if op_name(node) in SOFTMAX:
                self._score_nodes(node)
        self._working = sum(1 << self.at[node] for node in working)
        for node in self.order:
            if op_name(node) == "add" and node not in self._scoring:
                self._residual(node)

    def _ancestors(self) -> None:
        written: dict[fx.Node, int] = {}
        for position, node in enumerate(self.order):
            mask, data = 0, node.op == "placeholder"
            for source in node.all_input_nodes:
                at = self.at[source]
                mask |= self.above[at] | 1 << at | written.get(source, 0)
                data = data or bool(self.data >> at & 1)
            if op_name(node) in WRITING and isinstance(node.args[0], fx.Node):
                for base in view_chain(node.args[0]):
                    written[base] = written.get(base, 0) | mask | 1 << position
                    if data:
                        self.data |= 1 << self.at[base]
            self.above.append(mask)
            if data and not isinstance(node.meta.get("val"), torch.SymInt | int):
                self.data |= 1 << position

    def is_data(self, node: fx.Node) -> bool:
        """Whether ``node`` depends on the values of an input."""
        return bool(self.data >> self.at[node] & 1)

    def is_above(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether ``second`` is computed from ``first``."""
        return bool(self.above[self.at[second]] >> self.at[first] & 1)

    def parameters(self, weight: fx.Node) -> list[fx.Node]:
        """Stored matrices that a constant expression is made of."""
        if weight.op == "get_attr":
            return [weight]
        found = [self.order[i] for i in bits(self.above[self.at[weight]])]
        return [n for n in found if n.op == "get_attr" and n.meta["val"].dim() >= 2]

    # --- weights ---------------------------------------------------------------------------------------

    def _recognise(self, node: fx.Node) -> None:
        name = op_name(node)
        if name == "linear":
            self._linear(node, node.args[0], node.args[1], out_axis=0)
        elif name == "addmm":
            self._linear(node, node.args[1], node.args[2], out_axis=1)
        elif name == "mm":
            self._linear(node, node.args[0], node.args[1], out_axis=1)
        elif name in PRODUCTS:
            factors = _factors(node)
            if factors is not None and (name == "einsum" or not self._linear(node, *factors, out_axis=1)):
                self._written_out(node, *factors)
        elif "grouped_mm" in name:
            self._linear(node, node.args[0], node.args[1], out_axis=1)
        elif name == _SDPA:
            query, key, value = tensor_nodes(node.args[:3])
            self.attentions[node] = Attention(node, query, key, value, self._called(_SDPA))
        elif name in CONVOLUTIONS:
            self.convolutions.append(node)
        elif name == "embedding":
            self.embeddings.append(node)

    def _linear(self, node: fx.Node, data: Any, weight: Any, *, out_axis: int) -> bool:
        if not (isinstance(data, fx.Node) and isinstance(weight, fx.Node)):
            return False
        dims = weight.meta["val"].dim()
        stored = [] if self.is_data(weight) else self.parameters(weight)
        if dims == 3:
            selected = self._selected(weight)
            stored = [selected] if selected is not None else []
        if dims not in (2, 3) or not stored:
            return False
        parameter = str(stored[0].target) if len(stored) == 1 else None
        out = self.sizes.size(weight.meta["val"].shape[-1 if dims == 3 else out_axis])
        self.linears[node] = Linear(node, data, weight, parameter, out, experts=dims == 3)
        return True

    def _selected(self, weight: fx.Node) -> fx.Node | None:
        """The stored 3-D tensor that ``weight`` is, or picks matrices from."""
        while weight.op == "call_function" and (op_name(weight) in MOVING or op_name(weight) in PASSING):
            source = weight.args[0]
            if not isinstance(source, fx.Node):
                return None
            weight = source
        return weight if weight.op == "get_attr" and weight.meta["val"].dim() == 3 else None

    # --- attentions ------------------------------------------------------------------------------------

    def _called(self, name: str) -> str:
        return f"{name}#{len(self.attentions)}"

    def _written_out(self, node: fx.Node, first: fx.Node, second: fx.Node) -> None:
        """``softmax(Q K^T) V``, spelled out: follow the weights back to a softmax, then on to the scores."""
        for weights, value in ((first, second), (second, first)):
            softmax = self._softmax(weights) if self.is_data(value) else None
            scores = self._scores(softmax) if softmax is not None else []
            if scores:
                near = [s for s in scores if self._share_input(s[1], value)] or scores
                query, key = near[0]
                name = self._called("softmax attention")
                self.attentions[node] = Attention(node, query, key, value, name)
                return
            if op_name(node) != "einsum":
                return

    def _softmax(self, node: fx.Node) -> fx.Node | None:
        for _ in range(32):
            name = op_name(node)
            if name in SOFTMAX:
                return node
            if name not in PASSING and name not in MOVING and name not in ("mul", "where", "masked_fill", "nan_to_num"):
                return None
            sources = [n for n in tensor_nodes(node.all_input_nodes) if n.meta["val"].is_floating_point()]
            sources = [n for n in sources if self.is_data(n)]
            if not sources:
                return None
            node = sources[0]
        return None

    def _scores(self, softmax: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Operands of the products that make the scores, in the order met from the softmax upwards."""
        found: list[tuple[fx.Node, fx.Node]] = []
        pending, seen = [softmax.args[0]], set()
        while pending:
            node = pending.pop(0)
            if not isinstance(node, fx.Node) or node in seen or node in self.linears or not self.is_data(node):
                continue
            seen.add(node)
            name = op_name(node)
            if name in PRODUCTS:
                factors = _factors(node)
                if factors is not None:
                    found.append(factors)
            elif name not in ("embedding", _SDPA) and name not in CONVOLUTIONS:
                pending += node.all_input_nodes
        return found

    def _score_nodes(self, softmax: fx.Node) -> None:
        """Sums on the way to a softmax add masks and biases to scores: no residual adds."""
        pending = [n for n in softmax.all_input_nodes if self.is_data(n)]
        while pending:
            node = pending.pop()
            name = op_name(node)
            passing = name in PASSING or name in MOVING or name in ("add", "mul", "div", "where", "masked_fill", "sub")
            if node in self._scoring or not passing or node in self.linears:
                continue
            self._scoring.add(node)
            pending += [n for n in node.all_input_nodes if self.is_data(n)]

    def _share_input(self, first: fx.Node, second: fx.Node) -> bool:
        """Whether the nearest weights above two values read the same node."""
        return bool(self._nearest_inputs(first) & self._nearest_inputs(second))

    def _nearest_inputs(self, node: fx.Node) -> set[fx.Node]:
        found: set[fx.Node] = set()
        pending, seen = [node], set()
        while pending:
            node = pending.pop()
            if node in seen:
                continue
            seen.add(node)
            if node in self.linears:
                found.add(self._bare(self.linears[node].input))
            else:
                pending += [n for n in node.all_input_nodes if self.is_data(n)]
        return found

    # --- residual adds ---------------------------------------------------------------------------------

    def _bare(self, node: fx.Node) -> fx.Node:
        """``node`` without casts, reshapes, dropout and scaling by a number on top."""
        while node.op == "call_function" and node.args and isinstance(node.args[0], fx.Node):
            name = op_name(node)
            scaled = name in ("mul", "div") and not isinstance(node.args[1], fx.Node)
            if not (scaled or name in PASSING or name in RESHAPING):
                break
            node = node.args[0]
        return node

    def _residual(self, node: fx.Node) -> None:
        operands = tensor_nodes(node.args[:2])
        if len(operands) != 2:
            return
        shape = self.sizes.shape(node.meta["val"])
        if not shape or any(self.sizes.shape(n.meta["val"]) != shape or not self.is_data(n) for n in operands):
            return
        for stream, branch in (operands, operands[::-1]):
            if any(self._computed_from(base, branch) for base in self._bases(stream)):
                self.residuals[node] = Residual(node, stream, branch)
                return

    def _bases(self, stream: fx.Node) -> list[fx.Node]:
        """What a branch on ``stream`` may start from: the stream here, and before its last adds (parallel branches)."""
        bases = [stream, self._bare(stream)]
        while bases[-1] in self.residuals and len(bases) < 4:
            bases.append(self._bare(self.residuals[bases[-1]].stream))
        return bases

    def _computed_from(self, base: fx.Node, branch: fx.Node) -> bool:
        """Whether a weight or an attention lies on the way from ``base`` to ``branch``."""
        at = self.at[branch]
        if not self.is_above(base, branch):
            return False
        later = (self.above[at] | 1 << at) & self._working & ~((1 << self.at[base] + 1) - 1)
        return any(self.above[i] >> self.at[base] & 1 for i in bits(later))


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two operands of a product; the second holds the last axis of the result."""
    name = op_name(node)
    if name == "einsum":
        equation, operands = str(node.args[0]).replace(" ", ""), node.args[1]
        inputs, _, output = equation.partition("->")
        if not isinstance(operands, list | tuple) or len(operands) != 2 or not output:
            return None
        first, second = operands
        if output[-1] not in inputs.split(",")[1]:
            first, second = second, first
    else:
        first, second = node.args[1:3] if name == "baddbmm" else node.args[:2]
    return (first, second) if isinstance(first, fx.Node) and isinstance(second, fx.Node) else None
