"""Packed weights in the representations that other software uses: evenly spaced values, or table entries."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class EvenSteps:
    """``(code - zero) * scale``, with scales and zero points for groups of the last axis.

    Attributes:
        bits: the number of bits per code, 4 or 8.
        codes: ``uint8[..., rows, in]``, 0 to ``2**bits - 1``, one code per byte.
        scales: ``float32[..., rows, groups]``.
        zeros: ``uint8`` of the shape of ``scales``; None means ``2**(bits - 1)`` everywhere.
        group: the number of inputs that share a scale; the last group may be shorter.
    """

    bits: int
    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    group: int


@dataclass(frozen=True)
class TableEntries:
    """``table[code] * scale``, with scales for blocks that span the whole weight in row-major order.

    Attributes:
        kind: ``nf4`` or ``fp4``.
        codes: ``uint8``, two 4-bit codes per byte, the first in the upper half.
        table: ``float32[16]``.
        scales: ``float32[blocks]``.
        group: the number of values that share a scale; the last block may be shorter.
    """

    kind: str
    codes: Tensor
    table: Tensor
    scales: Tensor
    group: int
