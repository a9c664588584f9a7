"""Find where an invocation, a given sequence of tokens, begins in each row of a batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, reduce
from typing import Any

import torch

aten = torch.ops.aten
_END = 2**63 - 1
_NO_TOKEN = -1


def last_start(call: Callable[..., Any], ids: Any, tokens: Sequence[int]) -> Any:
    """Return the index at which the last occurrence of ``tokens`` begins in each row, or -1: ``int64[batch]``.

    Args:
        call: a function that inserts a call into a graph, or one that runs it.
        ids: the token ids, ``[batch, length]``.
        tokens: the sequence to find.
    """
    later = len(tokens) - 1
    padded = call(aten.constant_pad_nd.default, ids, [0, later], _NO_TOKEN) if later else ids
    ends = [number - later for number in range(later)] + [_END]
    shifted = [call(aten.slice.Tensor, padded, 1, number, end) for number, end in enumerate(ends)]
    same = [call(aten.eq.Scalar, own, token) for own, token in zip(shifted, tokens, strict=True)]
    found = reduce(partial(call, aten.logical_and.default), same)
    numbers = call(aten.arange.default, call(aten.sym_size.int, ids, 1))
    return call(aten.amax.default, call(aten.where.ScalarOther, found, numbers, -1), [1])
