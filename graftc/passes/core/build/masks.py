"""The part of the `Builder` that works out masks and biases anew for keys that stand in front of a text."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.nodes import Nodes, Part
from graftc.passes.core.ir.past_inputs import past_length
from graftc.passes.core.ir.program import is_random, map_nodes, nodes_in
from graftc.passes.core.ir.shapes import expression

aten = torch.ops.aten
_LIKE = {
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
}
"""Calls that take no more than element type and device from their first argument."""

_NUMBERS = (13, 101)


class Masks(Part):
    """Replays the calls that make a mask, as if the text were longer in front."""

    def __init__(self, nodes: Nodes) -> None:
        super().__init__(nodes)
        self._replayed: dict[tuple[Any, int], dict[fx.Node, fx.Node]] = {}

    def longer(self, mask: fx.Node, size: Any, length: int) -> fx.Node | None:
        """``mask`` as the model would make it, had the text ``length`` more tokens in front that are no padding; rows
        of those are cut off again, so that only columns come in.

        All that it is made of is worked out again: sizes are greater, masks of tokens that are inputs have ones in
        front, numbers of positions begin at ``length``, stored tensors stay. That holds for windows, causal masks,
        tables of relative positions and ALiBi alike, with no need to know which it is. Masks of one size share what
        they have in common.

        Args:
            mask: ``[..., rows, size]``, made from sizes, stored tensors, masks of tokens and their positions.
            size: the number of keys: a symbol of the graph, or the tokens of a cache and those of the call together.
            length: how many tokens stand in front.

        Returns:
            ``[..., rows, size + length]``; None where something else goes in (activations, token ids, an input that is
            a mask of pairs already), where sizes are fixed, or where the result is no mask of that shape.
        """
        symbol = self._growing(expression(size))
        if symbol is None:
            return None
        held = self._replayed.setdefault((symbol, length), {})
        cone = _cone(mask, symbol)
        if cone is None:
            return None
        made: list[fx.Node] = []
        try:
            for node in cone:
                if node not in held and (again := self._longer(node, symbol, length, held)) is not None:
                    held[node] = again
                    made.append(node)
            return self._cut(mask, held[mask], length) if mask in held else None
        except (RuntimeError, IndexError, ValueError):  # sizes that do not fit: some were numbers when captured
            for node in reversed(made):
                del held[node]
            return None

    def _growing(self, size: Any) -> Any:
        """The symbol that is greater in a text with more tokens in front; None where there is none."""
        if isinstance(size, int):
            return None
        if size.is_symbol:
            return size
        past = past_length(self.program)
        return past if past is not None and _growth(size, past) == 1 else None

    def _longer(self, node: fx.Node, symbol: Any, length: int, held: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """What stands for ``node`` in the longer text; None where it is the same."""
        if node.op == "placeholder":
            return self._longer_input(node, symbol, length)
        if node.target is aten.sym_size.int:
            found = _growth(expression(node.meta["val"]), symbol) == 1
            return self._like(node, self.call(operator.add, node, length, part="mask")) if found else None
        if not any(source in held for source in _read(node)):
            return None
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: held.get(n, n))
        return self._like(node, self.call(node.target, *args, part="mask", **kwargs))

    def _longer_input(self, node: fx.Node, symbol: Any, length: int) -> fx.Node | None:
        axes = _axes(node, symbol)
        value = node.meta["val"]
        if not axes:
            cached = symbol == past_length(self.program) and _is_positions(node)
            return self._like(node, self.call(aten.add.Tensor, node, length, part="mask")) if cached else None
        (axis,) = axes
        sizes = [length if a == axis else self._size(node, a) for a in range(value.dim())]
        if not _is_positions(node):
            front = self.call(aten.new_ones.default, node, sizes, part="mask")
            return self._like(node, self.call(aten.cat.default, [front, node], axis, part="mask"))
        front = self.call(aten.new_zeros.default, node, sizes, part="mask")
        numbers = self.call(aten.arange.default, length, dtype=value.dtype, part="mask")
        front = self.call(aten.add.Tensor, front, numbers, part="mask")
        later = self.call(aten.add.Tensor, node, length, part="mask")
        return self._like(node, self.call(aten.cat.default, [front, later], axis, part="mask"))

    def _like(self, node: fx.Node, again: fx.Node) -> fx.Node:
        """It is where the model makes the mask, not in the layer that is adapted: other layers read it too."""
        again.meta["module"] = node.meta.get("module", "")
        return again

    def _cut(self, mask: fx.Node, again: fx.Node, length: int) -> fx.Node | None:
        before, after = mask.meta["val"].shape, again.meta["val"].shape
        if not same_size(after[-1], before[-1] + length):
            return None
        for axis, (old, new) in enumerate(zip(before[:-1], after[:-1], strict=True)):
            if same_size(new, old):
                continue
            if not same_size(new, old + length):
                return None
            again = self._like(mask, self.call(aten.slice.Tensor, again, axis, length, 2**63 - 1, part="mask"))
        return again


def same_size(first: Any, second: Any) -> bool:
    """Whether two sizes are one: by their expressions, or by the numbers that these give."""
    return surplus(first, second) == 0


def surplus(first: Any, second: Any) -> int | None:
    """How much greater a size is than another; None where that is no number."""
    difference = expression(first) - expression(second)
    if isinstance(difference, int) or difference.is_number:
        return int(difference)
    found = {_at(difference, start) for start in _NUMBERS}
    return found.pop() if len(found) == 1 else None


def _at(size: Any, start: int) -> int:
    """An expression with numbers from ``start`` for its symbols, no two the same."""
    symbols = sorted(size.free_symbols, key=str)
    return int(size.subs({symbol: start + 3 * i for i, symbol in enumerate(symbols)}))


def _is_positions(node: fx.Node) -> bool:
    return str(node.target).endswith("position_ids")


def _axes(node: fx.Node, symbol: Any) -> list[int]:
    return [axis for axis, size in enumerate(node.meta["val"].shape) if _growth(expression(size), symbol) == 1]


def _growth(size: Any, symbol: Any) -> int | None:
    """How much greater a size is where a symbol is greater by 1; None where that is no number."""
    if isinstance(size, int) or symbol not in size.free_symbols:
        return 0
    return surplus(size.subs(symbol, symbol + 1), size)


def _read(node: fx.Node) -> Iterable[fx.Node]:
    """What a call's values depend on."""
    if node.op != "call_function":
        return ()
    if node.target is aten.sym_size.int:
        return ()
    if node.target in _LIKE:
        return nodes_in((node.args[1:], dict(node.kwargs)))
    if node.target in (aten.type_as.default, aten.to.other):
        return nodes_in(node.args[:1])
    return node.all_input_nodes


def _cone(mask: fx.Node, symbol: Any) -> list[fx.Node] | None:
    """All that a mask is made of, in graph order; None where it cannot be made longer."""
    found: set[fx.Node] = set()
    pending = [mask]
    while pending:
        node = pending.pop()
        if node in found:
            continue
        found.add(node)
        if not _known_in_front(node, symbol):
            return None
        pending += _read(node)
    return sorted(found)


def _known_in_front(node: fx.Node, symbol: Any) -> bool:
    """Whether it can be told what stands in front: ones of a mask of tokens, numbers of positions, sizes."""
    if is_random(node):
        return False
    if node.target is aten.sym_size.int:
        expr = expression(node.meta["val"])
        return _growth(expr, symbol) in (0, 1)
    if node.op != "placeholder":
        return True
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return True
    known = value.dim() <= 2 and (_is_positions(node) or str(node.target).endswith("mask"))
    return known and len(_axes(node, symbol)) <= 1
