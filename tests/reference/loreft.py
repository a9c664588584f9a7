"""A reference for LoReFT with torch's own orthogonal parametrisation and explicit positions, for a model with hooks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import orthogonal


class Intervention(nn.Module):
    """``h + R^T (W h + b - R h)`` for the tokens of one kind of position."""

    def __init__(self, rotation: Tensor, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        width, rank = rotation.shape
        columns = nn.Linear(rank, width, bias=False, dtype=rotation.dtype)
        self.rotate = orthogonal(columns, orthogonal_map="householder", use_trivialization=False)
        self.source = nn.Linear(width, rank, dtype=rotation.dtype)
        with torch.no_grad():
            # torch reads signs of the columns from the diagonal; those of the product itself are all 1.
            self.raw.copy_(rotation.tril(-1) + torch.eye(width, rank, dtype=rotation.dtype))
            self.source.weight.copy_(weight)
            self.source.bias.copy_(bias)

    @property
    def raw(self) -> Tensor:
        """The parameter from which the orthonormal columns are computed, ``[width, rank]``."""
        raw: Tensor = self.rotate.parametrizations.weight.original  # type: ignore[union-attr]
        return raw

    def forward(self, hidden: Tensor) -> Tensor:
        """Return edited values ``[..., width]``."""
        columns = self.rotate.weight
        edited: Tensor = hidden + (self.source(hidden) - hidden @ columns) @ columns.T
        return edited


def positions(mask: Tensor, first: int, last: int) -> tuple[list[list[int]], list[list[int]]]:
    """Return, for each row of a mask, the positions of the first and of the last tokens that it does not exclude."""
    firsts, lasts = [], []
    for row in mask.tolist():
        real = [index for index, value in enumerate(row) if value]
        firsts.append(real[:first])
        lasts.append([index for index in (real[-last:] if last else []) if index not in firsts[-1]])
    return firsts, lasts


@contextmanager
def intervened(
    layers: Sequence[nn.Module],
    interventions: Sequence[Mapping[str, Intervention]],
    where: Sequence[tuple[list[list[int]], list[list[int]]] | None],
) -> Iterator[None]:
    """Run the block while every layer's output is edited.

    Args:
        layers: the layers, in order.
        interventions: for each layer, the interventions ``first`` and ``last``, which may be one module.
        where: for each layer, the positions of both in each row; None for every token, with ``first``.
    """

    def edit(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            own = interventions[index]
            if where[index] is None:
                edited = own["first"](hidden)
            else:
                edited = hidden.clone()
                for kind, rows in zip(("first", "last"), where[index], strict=True):
                    for row, columns in enumerate(rows):
                        for column in columns:
                            edited[row, column] = own[kind](hidden[row, column])
            return (edited, *output[1:]) if isinstance(output, tuple) else edited

        return hook

    handles = [layer.register_forward_hook(edit(index)) for index, layer in enumerate(layers)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
