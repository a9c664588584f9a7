"""Analyse one graph's data flow: ancestors, weights in use, attention and residual adds.

The analysis uses no model types, classes or parameter names: a weight is a value that depends on no input, attention is
a fused call or a softmax between two products, and a residual add joins a value with another computed from it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graftc.compiler.roles.attention_scores import keys_are_second
from graftc.compiler.roles.maps import Linear, read_map
from graftc.compiler.roles.operators import ADDING, MOVING, PASSING, PRODUCTS, RESHAPING, SOFTMAX, VIEWING, WRITING
from graftc.passes.core.ir.shapes import Sizes
from graftc.passes.core.sites.calls import is_convolution, op_name
from graftc.passes.core.worklist import Worklist

_SDPA = "scaled_dot_product_attention"


@dataclass(frozen=True)
class Attention:
    """One computation of attention: a fused call, or the product of a softmax with the values.

    Attributes:
        node: the call, or the product.
        query, key, value: its operands; if it is written out, query and key are the operands of the score product.
        name: its name in messages.
        written_out: whether it consists of several calls.
    """

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    name: str
    written_out: bool = False


@dataclass(frozen=True)
class Residual:
    """One residual add: ``node = stream + branch``.

    Attributes:
        node: the add, or another call that joins the two with fixed weights.
        stream, branch: the operands.
        base: the value from which the branch is computed: the stream, up to scaling, or the stream of an earlier add.
    """

    node: fx.Node
    stream: fx.Node
    branch: fx.Node
    base: fx.Node


def bits(mask: int) -> Iterator[int]:
    """Yield the positions of the set bits, lowest first."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low


def tensor_nodes(values: Iterable[Any]) -> list[fx.Node]:
    """Return the nodes among ``values`` that hold a tensor."""
    return [v for v in values if isinstance(v, fx.Node) and isinstance(v.meta.get("val"), torch.Tensor)]


def view_chain(node: fx.Node) -> list[fx.Node]:
    """Return a tensor and the tensors of which it is a view, nearest first."""
    chain = [node]
    while op_name(chain[-1]) in VIEWING and isinstance(chain[-1].args[0], fx.Node):
        chain.append(chain[-1].args[0])
    return chain


class Flow:
    """Facts about one graph that do not depend on the values of its tensors.

    Attributes:
        order, at: the nodes in graph order, and each node's position; bit sets contain positions.
        above: all ancestors of each node, as a bit set.
        data: the nodes that depend on the values (not only the sizes) of an input, as a bit set.
        linears: the linear maps, including convolutions with a stored kernel, by node in graph order.
        depthwise: the depthwise convolutions, which pass columns on.
        convolutions: the convolutions with a computed kernel.
        attentions, residuals, embeddings: the recognised attention calls, residual adds and embedding look-ups.
        working: the linear maps, convolutions and attention calls, as a bit set.
        products: the products of two values that both depend on data.
        scores: the products to which the softmax of an attention call is applied.
    """

    def __init__(self, graph: fx.Graph, sizes: Sizes) -> None:
        self.sizes = sizes
        self.order: list[fx.Node] = list(graph.nodes)
        self.at: dict[fx.Node, int] = {node: i for i, node in enumerate(self.order)}
        self.above: list[int] = []
        self.data = 0
        self.linears: dict[fx.Node, Linear] = {}
        self.depthwise: dict[fx.Node, Linear] = {}
        self.attentions: dict[fx.Node, Attention] = {}
        self.residuals: dict[fx.Node, Residual] = {}
        self.convolutions: list[fx.Node] = []
        self.embeddings: list[fx.Node] = []
        self.products: list[fx.Node] = []
        self.scores: set[fx.Node] = set()
        self._scoring: set[fx.Node] = set()
        self._ancestors()
        for node in self.order:
            if node.op == "call_function":
                self._recognise(node)
        for node in self.order:
            if op_name(node) in SOFTMAX:
                self._score_nodes(node)
        # A depthwise convolution with a skip connection is not a branch of a stream: its channels are passed on.
        self._weighty = self.marked((*self.linears, *self.attentions, *self.convolutions))
        self.working = self._weighty | self.marked(self.depthwise)
        for node in self.order:
            if op_name(node) in ADDING and node not in self._scoring:
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

    def number(self, leaf: Any) -> int | None:
        """Return a symbolic size, or the size that a node computes, as a number; None for a tensor."""
        value = leaf.meta.get("val") if isinstance(leaf, fx.Node) else leaf
        return self.sizes.size(value) if isinstance(value, torch.SymInt | int) else None

    def is_data(self, node: fx.Node) -> bool:
        """Return whether ``node`` depends on the values of an input."""
        return bool(self.data >> self.at[node] & 1)

    def marked(self, nodes: Iterable[fx.Node]) -> int:
        """Return nodes as a bit set of positions."""
        return sum(1 << self.at[node] for node in nodes)

    def nodes(self, mask: int) -> list[fx.Node]:
        """Return the nodes of a bit set, in graph order."""
        return [self.order[position] for position in bits(mask)]

    def up_to(self, node: fx.Node) -> int:
        """Return a node and its ancestors, as a bit set."""
        return self.above[self.at[node]] | 1 << self.at[node]

    def between(self, first: fx.Node, last: fx.Node, among: int = -1) -> list[fx.Node]:
        """Return the nodes that are computed from ``first`` and that are, or lead to, ``last``, in graph order.

        Args:
            first, last: the ends of the paths.
            among: the nodes that may be returned, as a bit set; by default all.
        """
        after = self.up_to(last) & among & ~((1 << self.at[first] + 1) - 1)
        return [node for node in self.nodes(after) if self.is_above(first, node)]

    def is_above(self, first: fx.Node, second: fx.Node) -> bool:
        """Return whether ``second`` is computed from ``first``."""
        return bool(self.above[self.at[second]] >> self.at[first] & 1)

    def parameters(self, weight: fx.Node) -> list[fx.Node]:
        """Return the stored matrices from which a constant expression is computed."""
        if weight.op == "get_attr":
            return [weight]
        ancestors = self.nodes(self.above[self.at[weight]])
        return [n for n in ancestors if n.op == "get_attr" and n.meta["val"].dim() >= 2]

    def weights(self, value: Any) -> list[fx.Node]:
        """Return the stored matrices from which a value is computed; none if it depends on data."""
        if not isinstance(value, fx.Node) or self.is_data(value):
            return []
        return self.parameters(value)

    def _recognise(self, node: fx.Node) -> None:
        name = op_name(node)
        linear = read_map(node, self.weights, self.sizes.size)
        if linear is not None:
            (self.depthwise if linear.own else self.linears)[node] = linear
        elif name in PRODUCTS:
            factors = _factors(node)
            if factors is not None:
                if all(self.is_data(n) for n in factors):
                    self.products.append(node)
                self._written_out(node, *factors)
        elif name == _SDPA:
            query, key, value = tensor_nodes(node.args[:3])
            self.attentions[node] = Attention(node, query, key, value, self._called(_SDPA))
        elif is_convolution(node):
            self.convolutions.append(node)
        elif name == "embedding":
            self.embeddings.append(node)

    # --- attention -------------------------------------------------------------------------------------

    def _called(self, name: str) -> str:
        return f"{name}#{len(self.attentions)}"

    def _written_out(self, node: fx.Node, first: fx.Node, second: fx.Node) -> None:
        """Register a written-out ``softmax(Q K^T) V``: follow the attention weights to a softmax and its scores."""
        for weights, value in ((first, second), (second, first)):
            softmax = self._softmax(weights) if self.is_data(value) else None
            scores = self._scores(softmax) if softmax is not None else []
            if scores:
                inputs = self._nearest_inputs(value)
                near = [s for s in scores if self._nearest_inputs(s[1]) & inputs] or scores
                query, key = near[0]
                name = self._called("softmax attention")
                self.attentions[node] = Attention(node, query, key, value, name, written_out=True)
                return

    def _softmax(self, node: fx.Node) -> fx.Node | None:
        for _ in range(32):
            name = op_name(node)
            if name in SOFTMAX:
                return node
            if name not in PASSING and name not in MOVING and name not in ("mul", "where", "masked_fill", "nan_to_num"):
                return None
            sources = filter(self.is_data, tensor_nodes(node.all_input_nodes))
            source = next((n for n in sources if n.meta["val"].is_floating_point()), None)
            if source is None:
                return None
            node = source
        return None

    def _scores(self, softmax: fx.Node) -> list[tuple[fx.Node, fx.Node]]:
        """Return the operands of the score products, in the order in which a search up from the softmax finds them."""
        operands: list[tuple[fx.Node, fx.Node]] = []
        nodes = Worklist(softmax.all_input_nodes[:1], nearest_first=True)
        for node in nodes:
            if node in self.linears or not self.is_data(node):
                continue
            name = op_name(node)
            if name in PRODUCTS:
                factors = _factors(node)
                if factors is not None:
                    second = keys_are_second(node, self.between(node, softmax.all_input_nodes[0]), softmax, self.sizes)
                    self.scores.add(node)
                    if second is not None:
                        operands.append(factors if second else factors[::-1])
            elif name not in ("embedding", _SDPA) and not is_convolution(node):
                nodes += node.all_input_nodes
        return operands

    def _score_nodes(self, softmax: fx.Node) -> None:
        """Mark nodes on paths to a softmax: their sums add masks and biases to scores and are not residual adds."""
        pending = [n for n in softmax.all_input_nodes if self.is_data(n)]
        while pending:
            node = pending.pop()
            name = op_name(node)
            passing = name in PASSING or name in MOVING or name in ("add", "mul", "div", "where", "masked_fill", "sub")
            if node in self._scoring or not passing or node in self.linears:
                continue
            self._scoring.add(node)
            pending += [n for n in node.all_input_nodes if self.is_data(n)]

    def _nearest_inputs(self, node: fx.Node) -> set[fx.Node]:
        """Return the inputs of the nearest linear maps above a value."""
        inputs: set[fx.Node] = set()
        nodes = Worklist([node])
        for source in nodes:
            if source in self.linears:
                inputs.add(self._bare(self.linears[source].input))
            else:
                nodes += filter(self.is_data, source.all_input_nodes)
        return inputs

    # --- residual adds ---------------------------------------------------------------------------------

    def _bare(self, node: fx.Node) -> fx.Node:
        """Return ``node`` without the casts, reshapes, dropout and data-independent scaling on top of it."""
        while node.op == "call_function":
            name = op_name(node)
            sources = tensor_nodes(node.args[:1])
            if name in ("mul", "div"):
                sources = [n for n in tensor_nodes(node.args[:2]) if self.is_data(n)]
            elif name not in PASSING and name not in RESHAPING:
                break
            if len(sources) != 1:
                break
            node = sources[0]
        return node

    def _residual(self, node: fx.Node) -> None:
        if not isinstance(node.meta["val"], torch.Tensor):  # an addition of sizes
            return
        operands = self._joined(node)
        if not operands:
            return
        shape = self.sizes.shape(node.meta["val"])
        if not shape or any(self.sizes.shape(n.meta["val"]) != shape or not self.is_data(n) for n in operands):
            return
        for operand, branch in (operands, operands[::-1]):
            stream = _uncast(operand)
            base = next((b for b in self._bases(stream) if self._computed_from(b, branch)), None)
            if base is not None:
                self.residuals[node] = Residual(node, stream, branch, base)
                return

    def _joined(self, node: fx.Node) -> list[fx.Node]:
        """Return the two values that a call adds, each with a data-independent weight; empty for any other call."""
        name = op_name(node)
        if name == "addcmul":
            terms = tensor_nodes(node.args[:3])
            operands = [*terms[:1], *(n for n in terms[1:] if self.is_data(n))]
        else:
            operands = tensor_nodes(node.args[:2])
        if name == "lerp" and isinstance(node.args[2], fx.Node) and self.is_data(node.args[2]):
            return []
        return operands if len(operands) == 2 else []

    def _bases(self, stream: fx.Node) -> list[fx.Node]:
        """Return where a branch on ``stream`` may start: at the stream, or before the last adds (parallel branches)."""
        bases = [stream, self._bare(stream)]
        while bases[-1] in self.residuals and len(bases) < 4:
            bases.append(self._bare(self.residuals[bases[-1]].stream))
        return bases

    def _computed_from(self, base: fx.Node, branch: fx.Node) -> bool:
        """Return whether a weight or an attention call lies on a path from ``base`` to ``branch``."""
        return self.is_above(base, branch) and bool(self.between(base, branch, self._weighty))


def _uncast(node: fx.Node) -> fx.Node:
    """Return a value without its casts to the dtype that it already has.

    The tracer does not distinguish the value from its cast, no matter which of them the model adds to.
    """
    while node.target is torch.ops.aten.to.dtype:
        source = node.all_input_nodes[0]
        if source.meta["val"].dtype != node.args[1]:
            break
        node = source
    return node


def _factors(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the two operands of a product; the second provides the last axis of the result."""
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
