"""Lengthen a sequence by virtual tokens, together with the inputs that accompany it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graftc.passes.core.build.batch import Call
from graftc.passes.core.build.position_ids import tokens_in_front
from graftc.passes.core.ir.program import VirtualTokens
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import SiteKey
from graftc.specs.base import VirtualRun

aten = torch.ops.aten
_END = 2**63 - 1


@dataclass(frozen=True)
class Lengthened:
    """One sequence to which virtual tokens are added.

    Attributes:
        ids: the input with its token ids.
        embeds: the input that takes token embeddings instead.
        value: the token embeddings in the capture that reads token ids.
        added: for each adaptation, its name, the sites of this sequence that it adapts, and its runs.
    """

    ids: str
    embeds: str
    value: fx.Node
    added: tuple[tuple[str, frozenset[SiteKey], tuple[VirtualRun, ...]], ...]

    @property
    def length(self) -> int:
        """The number of virtual tokens."""
        return sum(run.length for _, _, runs in self.added for run in runs)


FILLS = {
    "attention_mask": aten.new_ones.default,
    "token_type_ids": aten.new_zeros.default,
    "position_ids": None,
}
"""The operators that fill inputs at virtual tokens, by input name; None for positions, which are counted."""


class Sequenced:
    """A lengthened sequence with the inputs that accompany it.

    Attributes:
        values: the token embeddings and the inputs that accompany them, in their present state, by name.
        numbers: the positions, if they are counted from token ids; the ids are then lengthened as well.
    """

    def __init__(
        self,
        call: Call,
        stream: Lengthened,
        value: fx.Node,
        along: Mapping[str, fx.Node],
        ids: fx.Node,
        numbers: fx.Node | None = None,
    ) -> None:
        self.call, self.stream, self.ids, self.inputs = call, stream, ids, along
        self.values = {**along, stream.embeds: value}
        self.numbers = numbers
        if numbers is not None:
            self.values[stream.ids] = ids
        self.rows: dict[tuple[int, int], fx.Node] = {}
        self.starts: dict[tuple[int, int], fx.Node | int] = {}
        self.ahead = {"front": 0, "after_bos": 0}
        self.bounds: list[tuple[fx.Node, int]] = []  # for runs whose place differs from row to row
        runs = [((i, j), run) for i, (_, _, own) in enumerate(stream.added) for j, run in enumerate(own)]
        places = ("front", "after_bos")
        for key, run in sorted(runs, key=lambda item: (item[1].where not in places, item[1].where == "after_bos")):
            insert = self._insert if run.where in places else self._insert_by_row
            insert(key, run)

    @property
    def length(self) -> Any:
        """The size of the lengthened axis."""
        return self.values[self.stream.embeds].meta["val"].shape[1]

    def virtual(self) -> list[VirtualTokens]:
        """Return the places of each adaptation's virtual tokens."""
        tokens = []
        for i, (owner, sites, own) in enumerate(self.stream.added):
            keys = [(i, j) for j in range(len(own))]
            rows = tuple(self.rows[key] for key in keys)
            tokens.append(VirtualTokens(owner, sites, rows, tuple(self.starts[key] for key in keys)))
        return tokens

    def real(self, value: fx.Node) -> fx.Node:
        """Return ``value`` for real tokens only, along every axis whose size is that of the lengthened sequence."""
        length, shape = expression(self.length), value.meta["val"].shape
        axes = [axis for axis, size in enumerate(shape) if expression(size) == length]
        if isinstance(length, int):  # other sizes may be equal by chance
            axes = [axis for axis in axes if axis in ((2, 3) if len(shape) == 4 else (1,))]
        for axis in axes:
            value = self._picked(value, axis) if self.bounds else self._cut(value, axis)
        return value

    # --- places ----------------------------------------------------------------------------------------

    def _insert(self, key: tuple[int, int], run: VirtualRun) -> None:
        where = str(run.where)
        at = self.ahead["front"] + (1 + self.ahead["after_bos"] if where == "after_bos" else 0)
        lengthened = {}
        for name, value in self.values.items():
            new = self._new(key, name, value, run.length, self._part(value, at - 1, at) if at else None)
            after = self._part(value, at, _END) if at else value
            if _is_position(name):
                after = self.call(aten.add.Tensor, after, run.length)
            lengthened[name] = self.call(aten.cat.default, [*([self._part(value, 0, at)] if at else []), new, after], 1)
        self.values = lengthened
        self.starts[key] = at
        self.ahead[where] += run.length

    def _insert_by_row(self, key: tuple[int, int], run: VirtualRun) -> None:
        bound = self._bound(run.where)
        start = self.call(aten.add.Tensor, bound, sum(self.ahead.values()))
        for other, length in self.bounds:
            start = self.call(aten.add.Tensor, start, self._times(length, aten.le.Tensor, other, bound))
        size = self._size(self.values[self.stream.embeds], 1)
        lengthened = {}
        index: fx.Node | None = None
        for name, value in self.values.items():
            last = self._gathered(value, 1, self.call(aten.sub.Tensor, start, 1)) if _is_position(name) else None
            new = self._new(key, name, value, run.length, last)
            both = self.call(aten.cat.default, [value, new], 1)
            numbers = self._count(both)
            end = self.call(aten.add.Tensor, start, run.length)
            if index is None:
                inner = self.call(aten.add.Tensor, self.call(aten.sub.Tensor, numbers, start), size)
                later = self.call(aten.sub.Tensor, numbers, run.length)
                index = self.call(aten.where.self, self.call(aten.lt.Tensor, numbers, end), inner, later)
                index = self.call(aten.where.self, self.call(aten.lt.Tensor, numbers, start), numbers, index)
            lengthened[name] = self._gathered(both, 1, index)
            if _is_position(name):
                moved = self._times(run.length, aten.ge.Tensor, numbers, end)
                lengthened[name] = self.call(aten.add.Tensor, lengthened[name], moved)
        self.values = lengthened
        for other_key, other_start in self.starts.items():
            if isinstance(other_start, fx.Node):
                before = self._times(run.length, aten.lt.Tensor, start, other_start)
                self.starts[other_key] = self.call(aten.add.Tensor, other_start, before)
        self.starts[key] = start
        self.bounds.append((bound, run.length))

    def _bound(self, where: Any) -> fx.Node:
        """Return the number of tokens that precede a run in each row, ``int64[batch, 1]``."""
        number = self.call(aten.add.Tensor, self._count(self.ids), 1)
        mask = next((node for name, node in self.inputs.items() if name.endswith("attention_mask")), None)
        counted = number if mask is None else self.call(aten.mul.Tensor, number, mask)
        end = self.call(aten.amax.default, counted, [1], True)
        if isinstance(where, int):
            same = self.call(aten.eq.Scalar, self.ids, where)
            present = self.call(aten.any.dim, same, 1, True)
            first = self.call(aten.argmax.default, self.call(aten.to.dtype, same, torch.int64), 1, True)
            end = self.call(aten.where.self, present, self.call(aten.add.Tensor, first, 1), end)
        return self.call(aten.clamp_min.default, end, 1)

    # --- values ----------------------------------------------------------------------------------------

    def _new(self, key: tuple[int, int], name: str, value: fx.Node, length: int, last: fx.Node | None) -> fx.Node:
        """Return the values at virtual tokens.

        Virtual tokens are vectors of zeros that are visible to all tokens and belong to the first segment; their
        positions follow those in ``last``.
        """
        batch = self._size(value, 0)
        if name == self.stream.embeds:
            width = int(value.meta["val"].shape[-1])
            self.rows[key] = self.call(aten.new_zeros.default, value, [batch, length, width])
            return self.rows[key]
        if name == self.stream.ids:
            assert self.numbers is not None
            return tokens_in_front(self.call, self.numbers, value, length)
        if not _is_position(name):
            return self.call(FILLS[name.removeprefix("decoder_")], value, [batch, length])
        steps = self.call(aten.cumsum.default, self.call(aten.new_ones.default, value, [batch, length]), 1)
        return self.call(aten.sub.Tensor, steps, 1) if last is None else self.call(aten.add.Tensor, steps, last)

    def _count(self, like: fx.Node) -> fx.Node:
        """Return each place's index in its row, from 0: ``int64[batch, n]`` for ``like: [batch, n, ...]``."""
        while like.meta["val"].dim() > 2:
            like = self.call(aten.select.int, like, -1, 0)
        ones = self.call(aten.ones_like.default, like, dtype=torch.int64)
        return self.call(aten.sub.Tensor, self.call(aten.cumsum.default, ones, 1), 1)

    def _times(self, number: int, compare: Any, a: fx.Node, b: fx.Node) -> fx.Node:
        """Return ``number`` where a comparison holds, and 0 elsewhere."""
        holds = self.call(aten.to.dtype, self.call(compare, a, b), torch.int64)
        return self.call(aten.mul.Tensor, holds, number)

    def _part(self, value: fx.Node, start: int, end: int, axis: int = 1) -> fx.Node:
        return self.call(aten.slice.Tensor, value, axis, start, end)

    def _cut(self, value: fx.Node, axis: int) -> fx.Node:
        front, inner = self.ahead["front"], self.ahead["after_bos"]
        if not inner:
            return self._part(value, front, _END, axis)
        parts = [self._part(value, front, front + 1, axis), self._part(value, front + 1 + inner, _END, axis)]
        return self.call(aten.cat.default, parts, axis)

    def _picked(self, value: fx.Node, axis: int) -> fx.Node:
        number = self._count(self.ids)
        index = self.call(aten.add.Tensor, number, self.ahead["front"])
        if self.ahead["after_bos"]:
            inside = self.call(aten.clamp_max.default, number, 1)
            inside = self.call(aten.mul.Tensor, inside, self.ahead["after_bos"])
            index = self.call(aten.add.Tensor, index, inside)
        for bound, length in self.bounds:
            index = self.call(aten.add.Tensor, index, self._times(length, aten.ge.Tensor, number, bound))
        return self._gathered(value, axis, index)

    def _gathered(self, value: fx.Node, axis: int, index: fx.Node) -> fx.Node:
        """Return ``value`` at the places ``index: [batch, n]`` along one of its axes."""
        count, rank = index.meta["val"].shape[1], value.meta["val"].dim()
        sizes: list[Any] = [self._size(value, a) for a in range(rank)]
        sizes[axis] = count if isinstance(expression(count), int) else self.call(aten.sym_size.int, index, 1)
        for _ in range(axis - 1):
            index = self.call(aten.unsqueeze.default, index, 1)
        for _ in range(rank - axis - 1):
            index = self.call(aten.unsqueeze.default, index, -1)
        return self.call(aten.gather.default, value, axis, self.call(aten.expand.default, index, sizes))

    def _size(self, node: fx.Node, axis: int) -> Any:
        size = node.meta["val"].shape[axis]
        return size if isinstance(expression(size), int) else self.call(aten.sym_size.int, node, axis)


def _is_position(name: str) -> bool:
    return name.removeprefix("decoder_") == "position_ids"
