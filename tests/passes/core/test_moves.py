"""Numbers that represent entries move as torch moves the entries: every operator of the table, on random shapes."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from graftc.passes.core.sites.moves import BREAKS, HOLE, MOVES, Move, moved, moved_along, names_of

aten = torch.ops.aten
ROUNDS = 12
SIZE = "size"
"""Stands for a node of the graph that is a size."""

Case = tuple[Any, tuple[Any, ...]]
"""The operator, and its arguments after those that are numbered."""


def axis(rng: random.Random, shape: tuple[int, ...]) -> int:
    return rng.randrange(-len(shape), len(shape))


def two_axes(rng: random.Random, shape: tuple[int, ...]) -> tuple[int, int]:
    first, second = rng.sample(range(len(shape)), 2)
    return first, second - len(shape)


def shuffled(rng: random.Random, values: Any) -> list[Any]:
    return rng.sample(list(values), len(values))


def cuts(rng: random.Random, size: int) -> list[int]:
    at = rng.randrange(size + 1)
    return [at, size - at]


def wider(rng: random.Random, shape: tuple[int, ...]) -> list[int]:
    return [rng.randint(1, 3), *(rng.randint(2, 4) if size == 1 else -1 for size in shape)]


def chosen(rng: random.Random, size: int, *shape: int) -> Tensor:
    return torch.tensor([rng.randrange(size) for _ in range(torch.Size(shape).numel())]).reshape(shape)


CASES: dict[str, Callable[[random.Random, tuple[int, ...]], Case]] = {
    "contiguous": lambda r, s: (aten.contiguous.default, ()),
    "clone": lambda r, s: (aten.clone.default, ()),
    "detach": lambda r, s: (aten.detach.default, ()),
    "alias": lambda r, s: (aten.alias.default, ()),
    "lift_fresh_copy": lambda r, s: (aten.lift_fresh_copy.default, ()),
    "to": lambda r, s: (aten.to.dtype, (torch.float64,)),
    "_to_copy": lambda r, s: (aten._to_copy.default, ()),
    "type_as": lambda r, s: (aten.type_as.default, (torch.zeros(1, dtype=torch.float64),)),
    "view": lambda r, s: (aten.view.default, (shuffled(r, s),)),
    "reshape": lambda r, s: (aten.reshape.default, ([-1, s[r.randrange(4)]],)),
    "_unsafe_view": lambda r, s: (aten._unsafe_view.default, (shuffled(r, s),)),
    "view_as": lambda r, s: (aten.view_as.default, (torch.zeros(shuffled(r, s)),)),
    "reshape_as": lambda r, s: (aten.reshape_as.default, (torch.zeros(shuffled(r, s)),)),
    "flatten": lambda r, s: (aten.flatten.using_ints, tuple(sorted(r.sample(range(4), 2)))),
    "unflatten": lambda r, s: (aten.unflatten.int, (0, [1, s[0]])),
    "unsqueeze": lambda r, s: (aten.unsqueeze.default, (axis(r, s),)),
    "squeeze": lambda r, s: (aten.squeeze.dim, (axis(r, s),)) if r.random() < 0.7 else (aten.squeeze.default, ()),
    "ravel": lambda r, s: (aten.ravel.default, ()),
    "expand": lambda r, s: (aten.expand.default, (wider(r, s),)),
    "expand_as": lambda r, s: (aten.expand_as.default, (torch.zeros(2, *s),)),
    "broadcast_to": lambda r, s: (aten.broadcast_to.default, (wider(r, s),)),
    "transpose": lambda r, s: (aten.transpose.int, two_axes(r, s)),
    "permute": lambda r, s: (aten.permute.default, (shuffled(r, range(len(s))),)),
    "numpy_T": lambda r, s: (aten.numpy_T.default, ()),
    "t": lambda r, s: (aten.t.default, ()),
    "mT": lambda r, s: (aten.mT.default, ()),
    "matrix_H": lambda r, s: (aten.matrix_H.default, ()),
    "mH": lambda r, s: (aten.mH.default, ()),
    "adjoint": lambda r, s: (aten.adjoint.default, ()),
    "swapaxes": lambda r, s: (aten.swapaxes.default, two_axes(r, s)),
    "swapdims": lambda r, s: (aten.swapdims.default, two_axes(r, s)),
    "movedim": lambda r, s: (aten.movedim.int, two_axes(r, s)),
    "moveaxis": lambda r, s: (aten.moveaxis.int, two_axes(r, s)),
    "roll": lambda r, s: (aten.roll.default, ([r.randint(-3, 3)], [axis(r, s)])),
    "flip": lambda r, s: (aten.flip.default, ([axis(r, s)],)),
    "pixel_shuffle": lambda r, s: (aten.pixel_shuffle.default, (2,)),
    "pixel_unshuffle": lambda r, s: (aten.pixel_unshuffle.default, (2,)),
    "channel_shuffle": lambda r, s: (aten.channel_shuffle.default, (2,)),
    "slice": lambda r, s: (aten.slice.Tensor, (axis(r, s), r.randint(-2, 1), r.choice([SIZE, 9]), r.randint(1, 2))),
    "select": lambda r, s: (aten.select.int, (axis(r, s), r.choice([0, -1]))),
    "narrow": lambda r, s: (aten.narrow.default, (0, *cuts(r, s[0]))),
    "diagonal": lambda r, s: (aten.diagonal.default, (r.randint(-1, 1), *two_axes(r, s))),
    "split": lambda r, s: (aten.split.Tensor, (r.randint(1, 3), axis(r, s))),
    "split_with_sizes": lambda r, s: (aten.split_with_sizes.default, (cuts(r, s[1]), 1)),
    "chunk": lambda r, s: (aten.chunk.default, (r.randint(1, 3), axis(r, s))),
    "tensor_split": lambda r, s: (aten.tensor_split.sections, (r.randint(1, 3), axis(r, s))),
    "unbind": lambda r, s: (aten.unbind.int, (axis(r, s),)),
    "unsafe_split": lambda r, s: (aten.unsafe_split.Tensor, (r.randint(1, 3), axis(r, s))),
    "unsafe_split_with_sizes": lambda r, s: (aten.unsafe_split_with_sizes.default, (cuts(r, s[1]), 1)),
    "unsafe_chunk": lambda r, s: (aten.unsafe_chunk.default, (r.randint(1, 3), axis(r, s))),
    "hsplit": lambda r, s: (aten.hsplit.array, ([r.randrange(s[1])],)),
    "vsplit": lambda r, s: (aten.vsplit.array, ([r.randrange(s[0])],)),
    "dsplit": lambda r, s: (aten.dsplit.array, ([r.randrange(s[2])],)),
    "repeat": lambda r, s: (aten.repeat.default, ([r.randint(1, 2) for _ in range(5)],)),
    "repeat_interleave": lambda r, s: (aten.repeat_interleave.self_int, (r.randint(1, 3), axis(r, s))),
    "tile": lambda r, s: (aten.tile.default, ([r.randint(1, 2), r.randint(1, 3)],)),
    "unfold": lambda r, s: (aten.unfold.default, (axis(r, s), 1, 2)),
    "slice_scatter": lambda r, s: (aten.slice_scatter.default, (0, 0, SIZE)),
    "select_scatter": lambda r, s: (aten.select_scatter.default, (1, 0)),
    "diagonal_scatter": lambda r, s: (aten.diagonal_scatter.default, (0, 0, 1)),
    "pad": lambda r, s: (aten.pad.default, ([r.randint(-1, 2), r.randint(0, 2), r.randint(0, 1), 0],)),
    "constant_pad_nd": lambda r, s: (aten.constant_pad_nd.default, ([r.randint(0, 2), r.randint(-1, 1)],)),
    "index": lambda r, s: (aten.index.Tensor, ([None, chosen(r, s[1], 3), None, chosen(r, s[3], 2, 1)],)),
    "index_select": lambda r, s: (aten.index_select.default, (2, chosen(r, s[2], 5))),
    "gather": lambda r, s: (aten.gather.default, (1, chosen(r, s[1], s[0], 3, s[2], s[3]))),
    "take_along_dim": lambda r, s: (aten.take_along_dim.default, (chosen(r, s[1], s[0], 3, s[2], s[3]), 1)),
    "masked_select": lambda r, s: (aten.masked_select.default, (chosen(r, 2, *s) > 0,)),
}

SHAPES: dict[str, Callable[[random.Random], tuple[int, ...]]] = {
    "pixel_shuffle": lambda r: (2, 4 * r.randint(1, 2), r.randint(1, 3), 2),
    "pixel_unshuffle": lambda r: (2, r.randint(1, 2), 2 * r.randint(1, 3), 4),
    "channel_shuffle": lambda r: (2, 2 * r.randint(1, 3), 2, 3),
    **dict.fromkeys(("t", "numpy_T", "matrix_H"), lambda r: (r.randint(1, 4), r.randint(1, 4))),
}
JOINED: dict[str, tuple[Any, Callable[[random.Random, tuple[int, ...]], tuple[Any, ...]]]] = {
    "cat": (aten.cat.default, lambda r, s: (axis(r, s),)),
    "stack": (aten.stack.default, lambda r, s: (axis(r, s),)),
    "concat": (aten.concat.default, lambda r, s: (axis(r, s),)),
    "concatenate": (aten.concatenate.default, lambda r, s: (axis(r, s),)),
    "hstack": (aten.hstack.default, lambda r, s: ()),
    "vstack": (aten.vstack.default, lambda r, s: ()),
    "dstack": (aten.dstack.default, lambda r, s: ()),
    "column_stack": (aten.column_stack.default, lambda r, s: ()),
}
WRITTEN: dict[str, Callable[[Tensor, int], Tensor]] = {
    "slice_scatter": lambda x, size: x[:size],
    "select_scatter": lambda x, size: x[:, 0],
    "diagonal_scatter": lambda x, size: x.diagonal(0, 0, 1),
}


class Numbered:
    """A call in a graph, the values of its operands, and numbers for the entries of some of them."""

    def __init__(self, target: Any, shapes: list[tuple[int, ...]], rest: tuple[Any, ...], *, joined: bool) -> None:
        self.graph = fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.numbers: dict[fx.Node, Tensor] = {}
        self.entries = torch.randn(sum(torch.Size(shape).numel() for shape in shapes))
        start, nodes = 0, []
        for shape in shapes:
            count = torch.Size(shape).numel()
            node = self._operand(self.entries[start : start + count].reshape(shape))
            self.numbers[node] = torch.arange(start, start + count).reshape(shape)
            start += count
            nodes.append(node)
        args = (nodes,) if joined else tuple(nodes)
        self.node = self.graph.call_function(target, (*args, *(self._argument(value) for value in rest)))

    def _operand(self, value: Any) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.values)}")
        self.values[node] = value
        return node

    def _argument(self, value: Any) -> Any:
        if isinstance(value, list):
            return [self._argument(item) for item in value]
        if isinstance(value, Tensor):
            return self._operand(value)
        return self._operand(2) if value == SIZE else value

    def real(self) -> Any:
        args = fx.node.map_arg(self.node.args, self.values.__getitem__)
        return self.node.target(*args)  # type: ignore[operator]

    def moved(self) -> Any:
        return moved(self.node, lambda leaf: self.numbers.get(leaf, self.values[leaf]))


def same(real: Any, numbers: Any, entries: Tensor) -> bool:
    """Return whether the numbers say which entries a value has."""
    if isinstance(real, list | tuple):
        return len(real) == len(numbers) and all(same(a, b, entries) for a, b in zip(real, numbers, strict=True))
    expected = torch.where(numbers == HOLE, torch.zeros(()), entries[numbers])
    return real.shape == numbers.shape and torch.equal(real.to(expected), expected)


def numbered(name: str, rng: random.Random) -> Numbered:
    shape = SHAPES[name](rng) if name in SHAPES else tuple(rng.randint(1, 4) for _ in range(4))
    if name in JOINED:
        target, rest = JOINED[name]
        return Numbered(target, [shape, shape], rest(rng, shape), joined=True)
    target, arguments = CASES[name](rng, shape)
    shapes = [shape]
    if name in WRITTEN:
        shapes.append(tuple(WRITTEN[name](torch.zeros(shape), 2).shape))
    return Numbered(target, shapes, arguments, joined=False)


@pytest.mark.parametrize("name", sorted(set(MOVES) - names_of(Move.ITEM)))
def test_numbers_go_where_torch_moves_entries(name: str) -> None:
    rng = random.Random(name)
    torch.manual_seed(0)
    for _ in range(ROUNDS):
        case = numbered(name, rng)
        assert same(case.real(), case.moved(), case.entries), case.node.format_node()


def test_an_item_is_one_of_several_parts() -> None:
    parts = Numbered(aten.split.Tensor, [(5, 3)], (2,), joined=False)
    item = parts.graph.call_function(operator.getitem, (parts.node, 1))
    numbers = moved(item, {parts.node: parts.moved()}.get)
    assert same(parts.real()[1], numbers, parts.entries) and numbers.tolist() == [[6, 7, 8], [9, 10, 11]]


def test_each_operator_is_in_one_group_and_is_known_to_torch() -> None:
    every = [name for move in Move for name in names_of(move)]
    assert sorted(every) == sorted(MOVES) and len(every) == len(set(every))
    assert all(name == "getitem" or hasattr(aten, name) for name in MOVES)


def test_numbers_that_are_broadcast_need_no_view() -> None:
    rows = torch.arange(3)[:, None].expand(3, 4)
    for target in (aten.view.default, aten._unsafe_view.default):
        case = Numbered(target, [(3, 4)], ([12],), joined=False)
        assert moved(case.node, lambda leaf: rows).tolist() == [0] * 4 + [1] * 4 + [2] * 4


def test_what_is_not_known_is_told_from_what_does_not_run() -> None:
    case = Numbered(aten.index_select.default, [(3, 4)], (0, torch.tensor([1])), joined=False)
    first = case.node.all_input_nodes[0]
    assert moved(case.node, case.numbers.get) is None
    assert moved_along([(first, case.node)], case.numbers[first]) is None
    other = Numbered(aten.sin.default, [(3, 4)], (), joined=False)
    assert other.moved() is None
    assert moved_along([(None, other.node)], torch.arange(3), passing={"sin"}).tolist() == [0, 1, 2]  # type: ignore[union-attr]
    broken = Numbered(aten.view.default, [(3, 4)], ([5],), joined=False)
    with pytest.raises(BREAKS):
        broken.moved()
    assert moved_along([(broken.node.args[0], broken.node)], torch.arange(12).reshape(3, 4)) is None
