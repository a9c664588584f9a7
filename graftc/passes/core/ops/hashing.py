"""Random numbers without a generator: hashes of element indices, identical on every device and in any order."""

from __future__ import annotations

import torch
from torch import Tensor

SEEDS = 2**62
"""Seeds are drawn from ``[0, SEEDS)``."""


def hashed(numbers: Tensor, seed: Tensor) -> Tensor:
    """Return 31 random bits for each number, keyed by the seed, as non-negative ``int32`` of ``numbers``' shape.

    The two halves of the seed provide a multiplier and an offset. The mixing uses only 32-bit integer operations, so
    the bits are the same on every device and in eager, compiled and exported runs.

    Args:
        numbers: ``int32``.
        seed: ``int64[1]``.
    """
    low, high = halves(seed)
    return avalanche(numbers * (2 * high + 1) + low) & 0x7FFFFFFF


def wrapped(number: int) -> int:
    """Return the ``int32`` that has the lower 32 bits of a number: indices into large tensors may exceed ``int32``."""
    return (number + 2**31) % 2**32 - 2**31


def avalanche(z: Tensor) -> Tensor:
    """Mix the bits of each ``int32`` number, so that every bit of its result depends on all bits of the number."""
    z = (z ^ ((z >> 16) & 0xFFFF)) * 0x7FEB352D
    z = (z ^ ((z >> 15) & 0x1FFFF)) * (0x846CA68B - 2**32)
    return z ^ ((z >> 16) & 0xFFFF)


def counted(seed: Tensor, count: Tensor) -> Tensor:
    """Return the output of SplitMix64 for the state ``seed`` advanced by ``count`` increments, all in ``int64``."""
    z = seed + count * (0x9E3779B97F4A7C15 - 2**64)
    z = (z ^ ((z >> 30) & (2**34 - 1))) * (0xBF58476D1CE4E5B9 - 2**64)
    z = (z ^ ((z >> 27) & (2**37 - 1))) * (0x94D049BB133111EB - 2**64)
    return z ^ ((z >> 31) & (2**33 - 1))


def halves(key: Tensor) -> tuple[Tensor, Tensor]:
    """Return the lower 62 bits of an ``int64`` as two ``int32`` values, the lower half first."""
    return (key & 0x7FFFFFFF).to(torch.int32), ((key >> 31) & 0x7FFFFFFF).to(torch.int32)
