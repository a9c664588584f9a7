"""Unpack codes of a few bits from the 32-bit words that store them."""

from __future__ import annotations

import torch
from torch import Tensor

_WORD = 32


def fields(words: Tensor, bits: int, count: int) -> Tensor:
    """Return the first ``count`` codes along the last axis, ``uint8[..., count]``.

    Args:
        words: ``int32[..., n]``: a stream of bits that starts at the lowest bit of the first word.
        bits: the number of bits per code, 1 to 8.
        count: the number of codes, at most ``n * 32 / bits``.
    """
    start = torch.arange(count) * bits
    word, bit = start // _WORD, start % _WORD
    wide = torch.nn.functional.pad(words, (0, 1)).to(torch.int64) & 0xFFFFFFFF
    pairs = wide[..., :-1] | (wide[..., 1:] << _WORD)
    return ((pairs[..., word] >> bit) & ((1 << bits) - 1)).to(torch.uint8)


def words_for(count: int, bits: int) -> int:
    """Return the number of words that ``count`` codes occupy."""
    return -(-count * bits // _WORD)
