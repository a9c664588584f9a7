"""The part of the `Builder` that recomputes masks and biases for keys placed before the text."""

from __future__ import annotations

import operator
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping
from functools import cached_property
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.build.nodes import Nodes, size_of
from graftc.passes.core.ir.past_inputs import past_length
from graftc.passes.core.ir.program import Program, above, is_random, limited, map_nodes, nodes_in
from graftc.passes.core.ir.shapes import expression

aten = torch.ops.aten
_LIKE = {
    aten.new_ones.default,
    aten.new_zeros.default,
    aten.new_full.default,
    aten.new_empty.default,
}
"""Calls that use only the dtype and device of their first argument."""

_NUMBERS = (13, 101)
_LEAST, _LONGEST = 2, 2**24
END = 2**63 - 1
"""The end of a slice without an upper bound."""

_ROWS = 2
_HIDDEN = -1e3
"""A bias of at most this value hides a key."""


class Masks(Nodes):
    """Replays the calls that compute a mask, as if more tokens preceded the text."""

    @cached_property
    def _replayed(self) -> dict[tuple[Any, int], dict[fx.Node, fx.Node]]:
        """The nodes that replace others for a longer text, by the growing size and the number of tokens in front."""
        return {}

    def _longer_mask(self, mask: fx.Node, size: Any, length: int) -> fx.Node | None:
        """Return ``mask`` as the model would compute it if ``length`` more tokens, none of them padding, came first.

        The rows for these tokens are cut off again, so that only columns are added.

        Everything that the mask depends on is recomputed: sizes grow, ones are put before token masks passed as inputs,
        the text's position ids begin at ``length``, and stored tensors stay the same. This handles windows, causal
        masks, tables of relative positions and ALiBi alike, without distinguishing them. Masks of the same size share
        the nodes that they have in common.

        Args:
            mask: the mask, ``[..., rows, size]``, computed from sizes, stored tensors, token masks and position ids.
            size: the number of keys: a symbol of the graph, or the number of cached tokens plus the call's own.
            length: the number of tokens in front.

        Returns:
            ``[..., rows, size + length]``; None if the mask depends on anything else (activations, token ids, an input
            that is already a pairwise mask), if sizes are fixed, or if the result does not have that shape.
        """
        symbol = self._growing(expression(size))
        if symbol is None:
            return None
        replayed = self._replayed.setdefault((symbol, length), {})
        cone = _cone(mask, symbol)
        if cone is None:
            return None
        added: list[fx.Node] = []
        try:
            for node in cone:
                if node not in replayed and (again := self._longer(node, symbol, length, replayed)) is not None:
                    replayed[node] = again
                    added.append(node)
            return self._cut(mask, replayed[mask], symbol, length) if mask in replayed else None
        except (RuntimeError, IndexError, ValueError):  # sizes do not match: some were captured as constants
            for node in reversed(added):
                del replayed[node]
            return None

    def _hides_only(self, bias: fx.Node) -> bool:
        """Return whether a bias of fixed size is known to be zero except where it hides a key.

        The answer is also True for a bias that depends on activations, token ids or a pairwise mask, since its values
        for other keys do not depend on their positions alone, and for the bias of an image model, where no position
        precedes those of the other keys.
        """
        if _cone(bias, None) is None or all(len(spec.shape) > 3 for spec in self.program.inputs):
            return True
        try:
            device = self.store.device()
            (values,) = computed([bias], lambda node: _sample(node).to(device), self.store.get, device)
        except (RuntimeError, IndexError):
            return False
        return not values.is_meta and bool(((values == 0) | (values <= _HIDDEN)).all())

    def _growing(self, size: Any) -> Any:
        """Return the symbol that grows when tokens are put in front of the text, or None."""
        if isinstance(size, int):
            return None
        if size.is_symbol:
            return size
        past = past_length(self.program)
        return past if past is not None and _growth(size, past) == 1 else None

    def _longer(self, node: fx.Node, symbol: Any, length: int, replaced: dict[fx.Node, fx.Node]) -> fx.Node | None:
        """Return the node that replaces ``node`` for the longer text, or None if it does not change."""
        if node.op == "placeholder":
            return self._longer_input(node, symbol, length)
        if node.target is aten.sym_size.int:
            grows = _growth(expression(node.meta["val"]), symbol) == 1
            return self._like(node, self.call(operator.add, node, length, part="mask")) if grows else None
        if not any(source in replaced for source in _read(node)):
            return None
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), lambda n: replaced.get(n, n))
        return self._like(node, self.call(node.target, *args, part="mask", **kwargs))

    def _longer_input(self, node: fx.Node, symbol: Any, length: int) -> fx.Node | None:
        axes = _axes(node, symbol)
        value = node.meta["val"]
        if not axes:
            cached = symbol == past_length(self.program) and _is_positions(node)
            return self._like(node, self.call(aten.add.Tensor, node, length, part="mask")) if cached else None
        (axis,) = axes
        sizes = [length if a == axis else size_of(self, node, a) for a in range(value.dim())]
        if not _is_positions(node):
            front = self.call(aten.new_ones.default, node, sizes, part="mask")
            return self._like(node, self.call(aten.cat.default, [front, node], axis, part="mask"))
        front = self.call(aten.new_zeros.default, node, sizes, part="mask")
        numbers = self.call(aten.arange.default, length, dtype=value.dtype, part="mask")
        front = self.call(aten.add.Tensor, front, numbers, part="mask")
        later = self.call(aten.add.Tensor, node, length, part="mask")
        return self._like(node, self.call(aten.cat.default, [front, later], axis, part="mask"))

    def _like(self, node: fx.Node, again: fx.Node) -> fx.Node:
        """Assign the recomputed node to the original's module and return it.

        The mask belongs to that module rather than to the adapted layer, because other layers read it as well.
        """
        again.meta["module"] = node.meta.get("module", "")
        return again

    def _cut(self, mask: fx.Node, again: fx.Node, symbol: Any, length: int) -> fx.Node | None:
        before, after = mask.meta["val"].shape, again.meta["val"].shape
        self._limit_tokens(after[-1], before[-1] + length, symbol, length)
        most = most_of(self.program)
        if not same_size(after[-1], before[-1] + length, most):
            return None
        for axis, (old, new) in enumerate(zip(before[:-1], after[:-1], strict=True)):
            if same_size(new, old, most):
                continue
            if not same_size(new, old + length, most):
                return None
            again = self._like(mask, self.call(aten.slice.Tensor, again, axis, length, END, part="mask"))
        return again

    def _limit_tokens(self, actual: Any, wanted: Any, symbol: Any, length: int) -> None:
        """Limit the token axis to sizes for which the mask covers all keys, since some masks are slices of a table."""
        rest = expression(actual) - expression(wanted)
        if isinstance(rest, int) or rest.free_symbols != {symbol} or rest.subs(symbol, _LEAST) != 0:
            return
        sizes = range(_LONGEST)
        most = bisect_left(sizes, True, lo=_LEAST, key=lambda size: rest.subs(symbol, size) != 0) - 1
        if most == sizes[-1]:
            return
        program = self.program
        names = {name for name, size, _ in _named_sizes(program) if size == symbol}
        why = f"{self.adaptation!r} uses {length} of the {most + length} positions for which attention has biases"
        for name in names:
            program.limits.setdefault(name, why)
        program.inputs = limited(program.inputs, dict.fromkeys(names, most))


def _named_sizes(program: Program) -> Iterator[tuple[str, Any, int | None]]:
    """Yield the name, the size and the maximum size of each named axis of the inputs."""
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        ranges = spec.ranges or [(0, None)] * len(spec.shape)
        for name, size, (_, high) in zip(spec.shape, node.meta["val"].shape, ranges, strict=True):
            if isinstance(name, str):
                yield name, expression(size), high


def most_of(program: Program) -> dict[Any, int]:
    """Return the maximum sizes for which a graph is valid, by symbol."""
    return {size: high for _, size, high in _named_sizes(program) if high is not None}


def same_size(first: Any, second: Any, most: Mapping[Any, int] = MappingProxyType({})) -> bool:
    """Return whether two sizes are equal, either as expressions or when evaluated."""
    return surplus(first, second, most) == 0


def surplus(first: Any, second: Any, most: Mapping[Any, int] = MappingProxyType({})) -> int | None:
    """Return the difference ``first - second`` of two sizes, or None if it is not constant.

    Symbols are never given values that exceed those in ``most``.
    """
    difference = expression(first) - expression(second)
    if isinstance(difference, int) or difference.is_number:
        return int(difference)
    values = {_at(difference, start, most) for start in _NUMBERS}
    return values.pop() if len(values) == 1 else None


def _at(size: Any, start: int, most: Mapping[Any, int]) -> int:
    """Evaluate an expression with values from ``start`` upwards for its symbols, distinct unless ``most`` caps them."""
    symbols = sorted(size.free_symbols, key=str)
    numbers = {symbol: start + 3 * i for i, symbol in enumerate(symbols)}
    return int(size.subs({symbol: min(number, most.get(symbol, number)) for symbol, number in numbers.items()}))


def _sample(node: fx.Node) -> Tensor:
    """Return a sample value for an input that a bias may depend on: a mask that hides nothing, or position ids."""
    value = node.meta["val"]
    sizes = [surplus(size, 0) or _ROWS for size in value.shape]  # `surplus` is None for dynamic sizes
    if _is_positions(node):
        return torch.arange(sizes[-1], dtype=value.dtype).expand(sizes)
    return torch.ones(sizes, dtype=value.dtype)


def _is_positions(node: fx.Node) -> bool:
    return str(node.target).endswith("position_ids")


def _axes(node: fx.Node, symbol: Any) -> list[int]:
    return [axis for axis, size in enumerate(node.meta["val"].shape) if _growth(expression(size), symbol) == 1]


def _growth(size: Any, symbol: Any) -> int | None:
    """Return how much a size grows when a symbol grows by 1, or None if that is not constant."""
    if isinstance(size, int) or symbol not in size.free_symbols:
        return 0
    return surplus(size.subs(symbol, symbol + 1), size)


def _read(node: fx.Node) -> Iterable[fx.Node]:
    """Return the nodes on which a call's values depend."""
    if node.op != "call_function" or node.target is aten.sym_size.int:
        return ()
    if node.target in _LIKE:
        return nodes_in((node.args[1:], dict(node.kwargs)))
    if node.target in (aten.type_as.default, aten.to.other):
        return nodes_in(node.args[:1])
    return node.all_input_nodes


def _cone(mask: fx.Node, symbol: Any) -> list[fx.Node] | None:
    """Return the nodes that a mask is computed from, in graph order, or None if the mask cannot be extended."""
    cone = above([mask], sources=_read)
    return cone if all(_known_in_front(node, symbol) for node in cone) else None


def _known_in_front(node: fx.Node, symbol: Any) -> bool:
    """Return whether a node's values for tokens in front are known, as for token masks, position ids and sizes."""
    if is_random(node):
        return False
    if node.target is aten.sym_size.int:
        return _growth(expression(node.meta["val"]), symbol) in (0, 1)
    if node.op != "placeholder":
        return True
    value = node.meta["val"]
    if not isinstance(value, Tensor):
        return True
    known = value.dim() <= 2 and (_is_positions(node) or str(node.target).endswith("mask"))
    return known and len(_axes(node, symbol)) <= 1
