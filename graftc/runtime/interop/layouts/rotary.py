"""The two orders in which rows of queries and keys stand within a head: halves of the rotation, or its pairs."""

from __future__ import annotations

from torch import Tensor

__all__ = ["as_halves", "as_pairs"]


def as_pairs(rows: Tensor, heads: int) -> Tensor:
    """Rows in transformers' order as Meta, torchtune and GGUF have those of Llama: the two numbers that rotate together
    stand side by side.

    Args:
        rows: ``[heads * size, ...]``.
        heads: how many heads the rows belong to.
    """
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)


def as_halves(rows: Tensor, heads: int) -> Tensor:
    """The way back from `as_pairs`."""
    return rows.reshape(heads, -1, 2, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)
