"""Convert between the two row orders within a query or key head: by rotation halves or by rotation pairs."""

from __future__ import annotations

from torch import Tensor


def as_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows so that the two rows that rotate together are adjacent.

    This converts transformers' order to the one that Meta, torchtune and GGUF use for Llama.

    Args:
        rows: the rows, ``[heads * size, ...]``.
        heads: number of heads in the rows.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def as_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows back; the inverse of `as_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)
