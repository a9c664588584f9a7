"""The two orders of the rows of queries and keys within a head: by halves of the rotation, or by its pairs."""

from __future__ import annotations

from torch import Tensor


def as_pairs(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows so that the two numbers that rotate together are adjacent.

    This turns transformers' order into the one that Meta, torchtune and GGUF use for Llama.

    Args:
        rows: the rows, ``[heads * size, ...]``.
        heads: number of heads that the rows belong to.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def as_halves(rows: Tensor, heads: int) -> Tensor:
    """Reorder rows back to the order that `as_pairs` starts from."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)
