"""Packed batches: several texts in one row, each marked by positions that start again."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import warn

POSITIONS, MASK = "position_ids", "attention_mask"


def warn_of_packed(present: Mapping[str, Any], virtual: Sequence[str], gated: Callable[[], Sequence[str]]) -> None:
    """Warn if packed texts are not treated as they would be alone.

    With a mask, models attend across texts (GC120); virtual tokens stand in front of the first text only (GC121); gates
    are computed over the whole row (GC122).

    Args:
        present: tensors of a call by name; positions are ``[batch, sequence]``, and other shapes mean something else.
        virtual: names of adaptations with virtual tokens.
        gated: a function that returns the names of adaptations with gates that are means over a row; called only if
            texts are packed.
    """
    positions, mask = present.get(POSITIONS), present.get(MASK)
    if not isinstance(positions, Tensor) or positions.dim() != 2 or positions.device.type == "meta":
        return
    restarts = positions[:, 1:] <= positions[:, :-1]
    if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1] >= positions.shape[1]:
        real = mask[:, mask.shape[1] - positions.shape[1] :].bool()  # the mask of a past comes first
        restarts = restarts & real[:, 1:] & real[:, :-1]  # padding may have any positions
    if not bool(torch.any(restarts)):
        return
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() > 2):  # a mask of pairs may separate texts
        message = f"{POSITIONS} begin anew in a row that has an {MASK} too: tokens attend to the texts before theirs"
        warn("GC120", message, hint=f"leave {MASK} out of packed batches")
    if virtual:
        message = f"of the texts packed into a row, only the first one has the virtual tokens of {virtual[0]!r}"
        warn("GC121", message, hint="do not pack texts, or use prefix, which every text of a row sees")
    if names := gated():
        message = f"the gates of {names[0]!r} are means over all texts that are packed into a row"
        warn("GC122", message, hint="do not pack texts where gates are")
