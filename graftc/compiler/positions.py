"""Find position tables: a graph that looks up a vector per position accepts no more tokens than the table has rows.

The lookups are found by trial: with twice as many tokens as the table has rows, such a lookup exceeds the table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.capture.past import CACHE, PAST, Past
from graftc.compiler.capture.signature import BATCH, size_of
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.past_inputs import SEEN, is_past
from graftc.passes.core.ir.program import InputSpec, Program, above
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError

_LARGEST = 2**16
"""The maximum number of rows of a table that is tested."""
_POSITIONS = "position_ids"


@dataclass(frozen=True)
class PositionTable:
    """A table that is read at the positions of tokens.

    Attributes:
        index: the node that computes the indices of the rows to read.
        most: the number of tokens for which the table has positions.
        rows: the table's number of rows; in some model families, positions begin after the first row.
        input: the name of the input that contains the tokens, and the index of its token axis.
        axis: the name of that axis.
        given: whether calls pass the positions.
    """

    index: fx.Node
    most: int
    rows: int
    input: tuple[str, int]
    axis: str
    given: bool

    def __deepcopy__(self, memo: dict[int, Any]) -> PositionTable:
        """Return the table itself: copies of a model share graphs."""
        return self

    def require(self, present: Mapping[str, Any], store: Store) -> None:
        """Check that every token of a call has a position.

        The indices are computed only if there are more tokens than positions, since some tokens may be padding, or if
        calls pass the positions and the graph runs on the CPU.

        Args:
            present: the inputs of the call, by name.
            store: the Store of the graph's tensors.

        Raises:
            GraftError: GC143 if a token's position is beyond the end of the table.
        """
        past, (name, dim) = present.get(CACHE), self.input
        past_tensors = past.tensors if isinstance(past, Past) else {}
        total = int(present[name].shape[dim]) + (past.length if isinstance(past, Past) else 0)
        device = store.device()
        if total <= self.most and not (self.given and device.type == "cpu"):
            return
        tensors = {**present, **past_tensors}
        (index,) = computed([self.index], lambda node: tensors[str(node.target)], store.get, device)
        require_positions(int(index.max()) + 1 - self.rows + self.most if index.numel() else 0, self.most)


def require_positions(tokens: int, most: int) -> None:
    """Check that a table has a position for every token of a text.

    Args:
        tokens: the number of tokens of the text.
        most: the number of tokens for which the table has positions.

    Raises:
        GraftError: GC143 if there are more tokens.
    """
    if tokens > most:
        raise GraftError("GC143", f"token {tokens} of a row has no position: the model has positions for {most} tokens")


def position_tables(program: Program, store: Store) -> tuple[PositionTable, ...]:
    """Return the tables that a graph reads at the positions of tokens.

    Args:
        program: a captured or an adapted graph.
        store: the Store of its tensors.
    """
    return tuple(_tables(program, store))


def _tables(program: Program, store: Store) -> Iterator[PositionTable]:
    counts = {
        expression(size): (spec, dim)
        for spec, node in zip(program.inputs, program.placeholders(), strict=True)
        for dim, size in enumerate(node.meta["val"].shape)
        if isinstance(spec.shape[dim], str) and spec.shape[dim] != BATCH and not is_past(spec.name)
    }
    for lookup in program.graph.find_nodes(op="call_function", target=torch.ops.aten.embedding.default):
        table, index = lookup.args[:2]
        rows, inputs = int(table.meta["val"].shape[0]), _inputs_of(index)
        counted = counts.get(expression(index.meta["val"].shape[-1])) if index.meta["val"].dim() else None
        if rows > _LARGEST or inputs is None or counted is None:
            continue
        if index.op == "placeholder" and not str(index.target).endswith(_POSITIONS):
            continue
        length = 2 * rows
        given = {spec.name: _long(spec, length, store.device()) for spec in program.inputs}
        try:
            (values,) = computed([index], lambda node: given[str(node.target)], store.get, store.device())  # noqa: B023
        except (RuntimeError, IndexError, ValueError, TypeError):
            continue  # the graph accepts only shorter texts
        begins = int(values.max()) + 1 - length
        if 0 <= begins < rows:
            spec, dim = counted
            taken = any(name.endswith(_POSITIONS) for name in inputs)
            yield PositionTable(index, rows - begins, rows, (spec.name, dim), str(spec.shape[dim]), taken)


def _inputs_of(index: fx.Node) -> set[str] | None:
    """Return the names of the inputs that an index is computed from; None if weights are involved."""
    sources = above([index])
    if any(node.op == "get_attr" and node.meta["val"].is_floating_point() for node in sources):
        return None
    return {str(node.target) for node in sources if node.op == "placeholder"}


def _long(spec: InputSpec, length: int, device: torch.device) -> Tensor:
    """Return an input with one row of ``length`` tokens, without padding and without a past."""
    sizes = {BATCH: 1, PAST: 0}
    shape = [size_of(size, sizes, length) if isinstance(size, str) else size for size in spec.shape]
    if spec.name == SEEN:
        return torch.zeros((), dtype=spec.dtype, device=device)
    if spec.name.endswith(_POSITIONS):
        return torch.arange(length, dtype=spec.dtype, device=device).expand(shape)
    return torch.full((), 1 if spec.name.endswith("mask") else 2, dtype=spec.dtype, device=device).expand(shape)
