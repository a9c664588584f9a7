"""A Program whose sequences have room for virtual tokens, composed of two captures of one model.

The model looks its words up as it does when it is called with token ids; its layers run as when they are called with
word vectors (the entry ``embeds``), so that every size, mask and position follows from the longer sequence; and what
comes behind the layers, which may look at ids and labels, runs on what real tokens have. Outputs that hold something
for each token hold it for the real ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graftc.passes.canonicalise import remove_dead
from graftc.passes.core.inference import Inference
from graftc.passes.core.program import InputSpec, Program, VirtualTokens, limited, map_nodes, nodes_in
from graftc.passes.core.shapes import expression
from graftc.passes.core.sites import SiteKey
from graftc.specs.diagnostics import GraftError
from graftc.specs.virtual import VirtualRun

aten = torch.ops.aten
_END = 2**63 - 1


@dataclass(frozen=True)
class Lengthened:
    """One sequence that gets virtual tokens.

    Attributes:
        ids: the input with its token ids.
        embeds: the input that takes word vectors instead.
        value: the word vectors in the capture that takes ids.
        added: the runs of each adaptation, with the sites of this sequence that it adapts.
    """

    ids: str
    embeds: str
    value: fx.Node
    added: tuple[tuple[str, frozenset[SiteKey], tuple[VirtualRun, ...]], ...]

    @property
    def length(self) -> int:
        """How many virtual tokens there are."""
        return sum(run.length for _, _, runs in self.added for run in runs)


def lengthen(
    tokens: Program,
    body: Program,
    streams: Sequence[Lengthened],
    ends: Sequence[tuple[fx.Node, fx.Node]],
    limits: Mapping[str, int | None],
) -> Program:
    """The composed Program, in which every virtual token's vector is zeros.

    Args:
        tokens: the capture that takes ids.
        body: the capture that takes word vectors, of the same outputs but for those that need labels.
        streams: what to lengthen.
        ends: where layers end: a value of `tokens` and the same in `body`.
        limits: how many tokens the layers read at most, by input of token ids; None where nothing bounds them.

    Raises:
        GraftError: GC019 where what comes behind the layers reads more than their results.
    """
    made = _Composer(tokens, body, streams, ends).program()
    return replace(made, inputs=_narrowed(tokens, streams, limits))


class _Composer:
    def __init__(
        self, tokens: Program, body: Program, streams: Sequence[Lengthened], ends: Sequence[tuple[fx.Node, fx.Node]]
    ) -> None:
        self.tokens, self.body, self.streams, self.ends = tokens, body, streams, dict(ends)
        self.graph = fx.Graph()
        self.types = Inference(tokens)
        self.first: dict[fx.Node, fx.Node] = {}  # of `tokens`
        self.second: dict[fx.Node, fx.Node] = {}  # of `body`
        self.attributes: dict[str, fx.Node] = {}

    def program(self) -> Program:
        for node in self.tokens.placeholders():
            self.first[node] = copied = self.graph.placeholder(str(node.target))
            copied.meta = dict(node.meta)
        inputs = {str(node.target): self.first[node] for node in self.tokens.placeholders()}
        sequences = [self._sequence(stream, inputs) for stream in self.streams]
        given = {**inputs, **{name: node for s in sequences for name, node in s.values.items()}}
        for node in self.body.graph.nodes:
            if node.op == "placeholder":
                self.second[node] = given[str(node.target)]
            elif node.op != "output":
                self._copy(node, self.second)
        leaves = self._outputs(sequences)
        output = self.graph.output(tuple(leaves))
        output.meta = dict(self.tokens.output_node.meta)
        made = replace(
            self.tokens.copy(),
            graph=self.graph,
            entry="embeds",
            virtual=tuple(v for s in sequences for v in s.virtual()),
        )
        remove_dead(made)
        return made

    def _sequence(self, stream: Lengthened, inputs: Mapping[str, fx.Node]) -> _Sequence:
        for node in _above([stream.value], stop=set()):
            if node not in self.first:
                self._copy(node, self.first)
        beside = [s for s in self.body.inputs if s.name in inputs and _goes_along(s.shape, self.tokens, stream.ids)]
        along = {s.name: inputs[s.name] for s in beside}
        for spec in beside:
            if len(spec.shape) != 2 or spec.name.removeprefix("decoder_") not in _FILLS:
                raise GraftError(
                    "GC019",
                    f"nobody can say what the input {spec.name} has at virtual tokens",
                    hint="call the model without it",
                )
        return _Sequence(self, stream, self.first[stream.value], along, inputs[stream.ids])

    # --- nodes -----------------------------------------------------------------------------------------

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Append a call that belongs to no module."""
        node = self.graph.call_function(target, args, kwargs)
        node.meta = {"val": self.types.call(target, args, kwargs), "module": ""}
        return node

    def _copy(self, node: fx.Node, mapping: dict[fx.Node, fx.Node]) -> fx.Node:
        if node.op == "get_attr" and str(node.target) in self.attributes:
            mapping[node] = self.attributes[str(node.target)]
            return mapping[node]
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), mapping.__getitem__)
        mapping[node] = made = self.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        made.meta = dict(node.meta)
        if node.op == "get_attr":
            self.attributes[str(node.target)] = made
            made.meta["val"] = self.types.tensor(node.meta["val"])
        elif mapping is self.second or any(n.meta["val"] is not m.meta["val"] for n, m in _pairs(node, mapping)):
            made.meta["val"] = self.types.call(node.target, args, kwargs)
        return made

    # --- behind the layers -----------------------------------------------------------------------------

    def _outputs(self, sequences: Sequence[_Sequence]) -> list[Any]:
        """The flat outputs: from the end of the layers where they need nothing else of these, otherwise the body's."""
        inside = _below([stream.value for stream in self.streams])
        behind = _below(list(self.ends))
        held = self.body.output_node.args[0]
        assert isinstance(held, tuple)
        found = dict(zip(self.body.outputs.names, held, strict=True))
        leaves = self.tokens.output_node.args[0]
        assert isinstance(leaves, tuple)
        result: list[Any] = []
        for name, leaf in zip(self.tokens.outputs.names, leaves, strict=True):
            needed = _above(nodes_in(leaf), stop=set(self.ends))
            early = [n for n in needed if n in inside and n not in behind and n not in self.ends and not _is_size(n)]
            if not early:
                result.append(map_nodes(leaf, lambda node: self._behind(node, sequences)))
            elif isinstance(found.get(name), fx.Node):
                result.append(_cropped(self.second[found[name]], sequences))
            else:
                raise GraftError(
                    "GC019",
                    f"the output {name} is made from {early[0].name}, which is inside of the layers",
                    hint="use a method that adds no virtual tokens, for example prefix",
                )
        return result

    def _behind(self, node: fx.Node, sequences: Sequence[_Sequence]) -> fx.Node:
        for source in _above([node], stop=set(self.ends)):
            if source in self.first:
                continue
            if source in self.ends:
                self.first[source] = _cropped(self.second[self.ends[source]], sequences)
            elif _is_size(source):
                self.first[source] = self._size_of_input(source)
            else:
                self._copy(source, self.first)
        return self.first[node]

    def _size_of_input(self, node: fx.Node) -> fx.Node:
        """A size of a value as that of an input: within the layers it is another one now."""
        wanted = expression(node.meta["val"])
        for placeholder in self.tokens.placeholders():
            for axis, size in enumerate(placeholder.meta["val"].shape):
                if expression(size) == wanted:
                    return self.call(aten.sym_size.int, self.first[placeholder], axis)
        raise GraftError("GC019", f"what comes behind the layers reads {node.name}, the size of a value within")


class _Sequence:
    """A lengthened sequence with the inputs that go along with it.

    Attributes:
        values: the word vectors and the inputs beside them, as they are so far, by name.
    """

    def __init__(
        self, into: _Composer, stream: Lengthened, value: fx.Node, along: Mapping[str, fx.Node], ids: fx.Node
    ) -> None:
        self.call, self.stream, self.ids, self.inputs = into.call, stream, ids, along
        self.values = {**along, stream.embeds: value}
        self.rows: dict[tuple[int, int], fx.Node] = {}
        self.starts: dict[tuple[int, int], fx.Node | int] = {}
        self.ahead = {"front": 0, "after_bos": 0}
        self.bounds: list[tuple[fx.Node, int]] = []  # of the runs whose place differs from row to row
        runs = [((i, j), run) for i, (_, _, own) in enumerate(stream.added) for j, run in enumerate(own)]
        order = ("front", "after_bos")
        for key, run in sorted(runs, key=lambda item: _rank(item[1].where, order)):
            if run.where in order:
                self._insert(key, run)
            else:
                self._insert_by_row(key, run)

    @property
    def length(self) -> Any:
        """The size of the lengthened axis."""
        return self.values[self.stream.embeds].meta["val"].shape[1]

    def virtual(self) -> list[VirtualTokens]:
        """Where each adaptation's tokens are."""
        found = []
        for i, (owner, sites, own) in enumerate(self.stream.added):
            keys = [(i, j) for j in range(len(own))]
            rows = tuple(self.rows[key] for key in keys)
            found.append(VirtualTokens(owner, sites, rows, tuple(self.starts[key] for key in keys)))
        return found

    def real(self, value: fx.Node) -> fx.Node:
        """What ``value`` has for real tokens, on every axis that counts the longer sequence."""
        length, shape = expression(self.length), value.meta["val"].shape
        axes = [axis for axis, size in enumerate(shape) if expression(size) == length]
        if isinstance(length, int):  # other sizes may be the same by chance
            axes = [axis for axis in axes if axis in ((2, 3) if len(shape) == 4 else (1,))]
        for axis in axes:
            value = self._picked(value, axis) if self.bounds else self._cut(value, axis)
        return value

    # --- places ----------------------------------------------------------------------------------------

    def _insert(self, key: tuple[int, int], run: VirtualRun) -> None:
        where = str(run.where)
        at = self.ahead["front"] + (1 + self.ahead["after_bos"] if where == "after_bos" else 0)
        made = {}
        for name, value in self.values.items():
            new = self._new(key, name, value, run.length, self._part(value, at - 1, at) if at else None)
            after = self._part(value, at, _END) if at else value
            if _is_position(name):
                after = self.call(aten.add.Tensor, after, run.length)
            made[name] = self.call(aten.cat.default, [*([self._part(value, 0, at)] if at else []), new, after], 1)
        self.values = made
        self.starts[key] = at
        self.ahead[where] += run.length

    def _insert_by_row(self, key: tuple[int, int], run: VirtualRun) -> None:
        bound = self._bound(run.where)
        start = self.call(aten.add.Tensor, bound, sum(self.ahead.values()))
        for other, length in self.bounds:
            start = self.call(aten.add.Tensor, start, self._times(length, aten.le.Tensor, other, bound))
        size = self._size(self.values[self.stream.embeds], 1)
        made = {}
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
            made[name] = self._gathered(both, 1, index)
            if _is_position(name):
                moved = self._times(run.length, aten.ge.Tensor, numbers, end)
                made[name] = self.call(aten.add.Tensor, made[name], moved)
        self.values = made
        for other_key, other_start in self.starts.items():
            if isinstance(other_start, fx.Node):
                before = self._times(run.length, aten.lt.Tensor, start, other_start)
                self.starts[other_key] = self.call(aten.add.Tensor, other_start, before)
        self.starts[key] = start
        self.bounds.append((bound, run.length))

    def _bound(self, where: Any) -> fx.Node:
        """Behind how many tokens of its row a run stands, ``int64[batch, 1]``."""
        number = self.call(aten.add.Tensor, self._count(self.ids), 1)
        mask = next((node for name, node in self.inputs.items() if name.endswith("attention_mask")), None)
        counted = number if mask is None else self.call(aten.mul.Tensor, number, mask)
        end = self.call(aten.amax.default, counted, [1], True)
        if isinstance(where, int):
            same = self.call(aten.eq.Scalar, self.ids, where)
            found = self.call(aten.any.dim, same, 1, True)
            first = self.call(aten.argmax.default, self.call(aten.to.dtype, same, torch.int64), 1, True)
            end = self.call(aten.where.self, found, self.call(aten.add.Tensor, first, 1), end)
        return self.call(aten.clamp_min.default, end, 1)

    # --- values ----------------------------------------------------------------------------------------

    def _new(self, key: tuple[int, int], name: str, value: fx.Node, length: int, last: fx.Node | None) -> fx.Node:
        """What stands at virtual tokens: vectors of zeros, seen by all, of the first segment, and with the positions
        that follow those of ``last``."""
        batch = self._size(value, 0)
        if name == self.stream.embeds:
            width = int(value.meta["val"].shape[-1])
            self.rows[key] = self.call(aten.new_zeros.default, value, [batch, length, width])
            return self.rows[key]
        if not _is_position(name):
            return self.call(_FILLS[name.removeprefix("decoder_")], value, [batch, length])
        steps = self.call(aten.cumsum.default, self.call(aten.new_ones.default, value, [batch, length]), 1)
        return self.call(aten.sub.Tensor, steps, 1) if last is None else self.call(aten.add.Tensor, steps, last)

    def _count(self, like: fx.Node) -> fx.Node:
        """The number of each place in its row, from 0: ``int64[batch, n]`` for ``like: [batch, n, ...]``."""
        while like.meta["val"].dim() > 2:
            like = self.call(aten.select.int, like, -1, 0)
        ones = self.call(aten.ones_like.default, like, dtype=torch.int64)
        return self.call(aten.sub.Tensor, self.call(aten.cumsum.default, ones, 1), 1)

    def _times(self, number: int, compare: Any, a: fx.Node, b: fx.Node) -> fx.Node:
        """``number`` where a comparison holds, else 0."""
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
        """``value`` at the places ``index: [batch, n]`` of one of its axes."""
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


_FILLS = {
    "attention_mask": aten.new_ones.default,
    "token_type_ids": aten.new_zeros.default,
    "position_ids": None,
}


def _is_position(name: str) -> bool:
    return name.removeprefix("decoder_") == "position_ids"


def _rank(where: Any, order: Sequence[str]) -> int:
    return order.index(where) if where in order else len(order)


def _cropped(value: fx.Node, sequences: Sequence[_Sequence]) -> fx.Node:
    for sequence in sequences:
        value = sequence.real(value)
    return value


def _goes_along(shape: Sequence[int | str], tokens: Program, ids: str) -> bool:
    """Whether an input has an axis that counts the tokens of a sequence."""
    own = _tokens_of(tokens, ids)
    return own in shape[1:] if isinstance(own, str) else len(shape) > 1 and shape[1] == own


def _tokens_of(tokens: Program, ids: str) -> int | str:
    """The axis of a sequence: its name, or its size."""
    return next(spec.shape[1] for spec in tokens.inputs if spec.name == ids)


def _narrowed(
    tokens: Program, streams: Sequence[Lengthened], limits: Mapping[str, int | None]
) -> tuple[InputSpec, ...]:
    """The inputs, of no more tokens than leave room for the virtual ones."""
    most: dict[str, int] = {}
    for stream in streams:
        own, limit = _tokens_of(tokens, stream.ids), limits[stream.ids]
        if limit is not None and isinstance(own, str):
            most[own] = limit - stream.length
    return limited(tokens.inputs, most)


def _is_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def _pairs(node: fx.Node, mapping: Mapping[fx.Node, fx.Node]) -> list[tuple[fx.Node, fx.Node]]:
    return [(source, mapping[source]) for source in node.all_input_nodes]


def _above(nodes: Sequence[fx.Node], stop: Set[fx.Node]) -> list[fx.Node]:
    """Some nodes and everything that they are made from, in graph order, up to those of ``stop``."""
    found, pending = set(nodes), [node for node in nodes if node not in stop]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in found:
                found.add(source)
                pending += [source] if source not in stop else []
    return sorted(found)


def _below(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Some nodes and everything that is made from them."""
    found, pending = set(nodes), list(nodes)
    while pending:
        for user in pending.pop().users:
            if user not in found:
                found.add(user)
                pending.append(user)
    return found
