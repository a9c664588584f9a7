"""Warnings for packed batches, whose rows contain several texts, delimited by positions that restart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.capture.past import CACHE, Past
from graftc.passes.core.ir.past_inputs import SEEN
from graftc.specs.errors.diagnostics import warn

POSITIONS, MASK = "position_ids", "attention_mask"


def warn_of_packed(present: Mapping[str, Any], virtual: Sequence[str], gated: Callable[[], Sequence[str]]) -> None:
    """Warn if packed texts are not computed as they would be if each had its own row.

    With a mask, models attend across texts (GC120); virtual tokens precede only the first text (GC121); gates are
    computed over the whole row (GC122).

    Args:
        present: the tensors of a call, by name; positions are ``[batch, sequence]``, other shapes are not checked.
        virtual: the names of adaptations with virtual tokens.
        gated: a function that returns the names of adaptations whose gates are means over a row; called only if texts
            are packed.
    """
    positions, mask = present.get(POSITIONS), present.get(MASK)
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.device.type == "meta":
        return
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= positions.shape[1]:
        past = present.get(CACHE)
        start = mask.shape[1] - positions.shape[1]  # the mask of the cached tokens comes first
        if isinstance(past, Past) and past.capacity is not None:
            start = int(past.tensors[SEEN])  # that of tokens to come is last
        real = mask[:, start : start + positions.shape[1]].bool()
        restarts = restarts & real[:, 1:] & real[:, :-1]  # padding may have any positions
    if not bool(torch.any(restarts)):
        return
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() > 2):  # a pairwise mask may separate texts
        message = f"{POSITIONS} start again within a row that also has an {MASK}: tokens attend to the preceding texts"
        warn("GC120", message, hint=f"leave {MASK} out of packed batches")
    if virtual:
        message = f"only the first of the texts packed into a row has the virtual tokens of {virtual[0]!r}"
        warn("GC121", message, hint="do not pack texts, or use prefix, which every text in a row sees")
    if names := gated():
        message = f"the gates of {names[0]!r} are means over all texts packed into a row"
        warn("GC122", message, hint="do not pack texts for a model with gates")
