"""Compose, from two captures of one model, a Program whose sequences have room for virtual tokens.

The model looks up its tokens as it does when it is called with token ids; its layers run as they do when it is called
with token embeddings (the entry ``embeds``), so that every size, mask and position follows from the longer sequence;
and the computation after the layers, which may read ids and labels, runs on the values of real tokens. Outputs with one
value per token contain only those of real tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from graftc.passes.core.build.position_ids import counted_inputs, recounted
from graftc.passes.core.ir.cleaning import remove_dead
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import create_node
from graftc.passes.core.ir.program import InputSpec, Program, above, limited, map_nodes, nodes_in
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.worklist import Worklist
from graftc.passes.graph.sequences import FILLS, Lengthened, Sequenced
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
_HINT = "use a method that adds no virtual tokens, for example prefix"


def lengthen(
    tokens: Program,
    body: Program,
    streams: Sequence[Lengthened],
    ends: Sequence[tuple[fx.Node, fx.Node]],
    limits: Mapping[str, int | None],
    counted: Sequence[tuple[fx.Node, fx.Node]] = (),
) -> Program:
    """Return the composed Program, in which every virtual token's vector is zero.

    Args:
        tokens: the capture that reads token ids.
        body: the capture that reads token embeddings, with the same outputs except those that need labels.
        streams: the sequences to lengthen.
        ends: the ends of the layers: pairs of a value in `tokens` and the same value in `body`.
        limits: the maximum number of tokens that the layers can read, by token-id input; None if it is unlimited.
        counted: pairs of positions that `tokens` counts from ids, which cannot be derived from token embeddings, and
            the same positions in `body`.

    Raises:
        GraftError: GC019 if the computation after the layers reads anything but their results.
    """
    lengthened = _Composer(tokens, body, streams, ends, counted).program()
    return replace(lengthened, inputs=_narrowed(tokens, streams, limits), updates=tokens.updates | body.updates)


class _Composer:
    def __init__(
        self,
        tokens: Program,
        body: Program,
        streams: Sequence[Lengthened],
        ends: Sequence[tuple[fx.Node, fx.Node]],
        counted: Sequence[tuple[fx.Node, fx.Node]],
    ) -> None:
        self.tokens, self.body, self.streams, self.ends = tokens, body, streams, dict(ends)
        self.counted = {own: numbers for numbers, own in counted}
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
            elif node in self.counted:
                self.second[node] = self._recounted(self.counted[node], sequences)
            elif node.op != "output":
                self._copy(node, self.second)
        output = self.graph.output(tuple(self._outputs(sequences)))
        output.meta = dict(self.tokens.output_node.meta)
        lengthened = replace(
            self.tokens.copy(),
            graph=self.graph,
            entry="embeds",
            virtual=tuple(v for s in sequences for v in s.virtual()),
        )
        remove_dead(lengthened)
        return lengthened

    def _sequence(self, stream: Lengthened, inputs: Mapping[str, fx.Node]) -> Sequenced:
        value = self._of_tokens(stream.value)
        taken = {spec.name for spec in self.body.inputs}  # in `body`, a static size is that of the longer sequence
        beside = [s for s in self.tokens.inputs if s.name in taken and _goes_along(s.shape, self.tokens, stream.ids)]
        along = {s.name: inputs[s.name] for s in beside}
        for spec in beside:
            if len(spec.shape) != 2 or spec.name.removeprefix("decoder_") not in FILLS:
                raise GraftError(
                    "GC019",
                    f"the input {spec.name} has no defined values at virtual tokens",
                    hint="call the model without it",
                )
        counted = self.counted.values()
        numbers = [n for n in counted if stream.ids in {str(node.target) for node in counted_inputs(n)}]
        return Sequenced(self.call, stream, value, along, inputs[stream.ids], *numbers[:1])

    def _recounted(self, numbers: fx.Node, sequences: Sequence[Sequenced]) -> fx.Node:
        """Return positions that are counted from ids, for the longer sequences."""
        longer = {
            node: s.values[str(node.target)]
            for node in counted_inputs(numbers)
            for s in sequences
            if str(node.target) in s.values
        }
        return recounted(numbers, longer, self.call, self._of_tokens)

    def _of_tokens(self, node: fx.Node) -> fx.Node:
        for source in above([node]):
            if source not in self.first:
                self._copy(source, self.first)
        return self.first[node]

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
        mapping[node] = copied = create_node(self.graph, node.op, node.target, args, kwargs, name=node.name)
        copied.meta = dict(node.meta)
        if node.op == "get_attr":
            self.attributes[str(node.target)] = copied
            copied.meta["val"] = self.types.tensor(node.meta["val"])
        elif mapping is self.second or any(n.meta["val"] is not mapping[n].meta["val"] for n in node.all_input_nodes):
            copied.meta["val"] = self.types.call(node.target, args, kwargs)
        return copied

    # --- after the layers ------------------------------------------------------------------------------

    def _outputs(self, sequences: Sequence[Sequenced]) -> list[Any]:
        """Return the flat outputs.

        An output is computed from the ends of the layers if it needs no other value from inside them; otherwise, the
        body's output is used.
        """
        inside = _below([stream.value for stream in self.streams])
        behind = _below(list(self.ends))
        body_leaves = self.body.output_node.args[0]
        assert isinstance(body_leaves, tuple)
        body_outputs = dict(zip(self.body.outputs.names, body_leaves, strict=True))
        leaves = self.tokens.output_node.args[0]
        assert isinstance(leaves, tuple)
        result: list[Any] = []
        for name, leaf in zip(self.tokens.outputs.names, leaves, strict=True):
            needed = above(nodes_in(leaf), stop=self.ends)
            early = [n for n in needed if n in inside and n not in behind and n not in self.ends and not _is_size(n)]
            if not early:
                result.append(map_nodes(leaf, lambda node: self._behind(node, sequences)))
            elif isinstance(body_outputs.get(name), fx.Node):
                result.append(_cropped(self.second[body_outputs[name]], sequences))
            else:
                raise GraftError(
                    "GC019",
                    f"the output {name} is computed from {early[0].name}, which is inside the layers",
                    hint=_HINT,
                )
        return result

    def _behind(self, node: fx.Node, sequences: Sequence[Sequenced]) -> fx.Node:
        for source in above([node], stop=self.ends):
            if source in self.first:
                continue
            if source in self.ends:
                self.first[source] = _cropped(self.second[self.ends[source]], sequences)
            elif _is_size(source):
                self.first[source] = self._size_of_input(source)
            else:
                try:
                    self._copy(source, self.first)
                except (RuntimeError, ValueError) as error:
                    message = f"the computation after the layers does not accept their results for real tokens: {error}"
                    raise GraftError("GC019", message, hint=_HINT) from error
        return self.first[node]

    def _size_of_input(self, node: fx.Node) -> fx.Node:
        """Return an input's size that equals a value's old size, since the value within the layers now has another."""
        wanted = expression(node.meta["val"])
        for placeholder in self.tokens.placeholders():
            for axis, size in enumerate(placeholder.meta["val"].shape):
                if expression(size) == wanted:
                    return self.call(aten.sym_size.int, self.first[placeholder], axis)
        raise GraftError("GC019", f"the computation after the layers reads {node.name}, the size of a value in them")


def _cropped(value: fx.Node, sequences: Sequence[Sequenced]) -> fx.Node:
    for sequence in sequences:
        value = sequence.real(value)
    return value


def _goes_along(shape: Sequence[int | str], tokens: Program, ids: str) -> bool:
    """Return whether an input has an axis over the tokens of a sequence."""
    own = _tokens_of(tokens, ids)
    return own in shape[1:] if isinstance(own, str) else len(shape) > 1 and shape[1] == own


def _tokens_of(tokens: Program, ids: str) -> int | str:
    """Return the token axis of a sequence: its name, or its size if it is static."""
    return next(spec.shape[1] for spec in tokens.inputs if spec.name == ids)


def _narrowed(
    tokens: Program, streams: Sequence[Lengthened], limits: Mapping[str, int | None]
) -> tuple[InputSpec, ...]:
    """Return the inputs, limited to a number of tokens that leaves room for the virtual ones."""
    most: dict[str, int] = {}
    for stream in streams:
        own, limit = _tokens_of(tokens, stream.ids), limits[stream.ids]
        if limit is not None and isinstance(own, str):
            most[own] = limit - stream.length
    return limited(tokens.inputs, most)


def _is_size(node: fx.Node) -> bool:
    return node.target is aten.sym_size.int


def _below(nodes: Sequence[fx.Node]) -> set[fx.Node]:
    """Return the given nodes and everything that is computed from them."""
    below = Worklist(nodes)
    for node in below:
        below += node.users
    return below.visited
