"""Packed batches: several texts in a row, which positions that begin anew tell apart."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import warn

POSITIONS, MASK = "position_ids", "attention_mask"


def warn_of_packed(present: Mapping[str, Any]) -> None:
    """Warn (GC120) of a call with packed texts and a mask, which has models attend across texts.

    Args:
        present: tensors of a call by name; both are ``[batch, sequence]``, other shapes mean something else.
    """
    positions, mask = present.get(POSITIONS), present.get(MASK)
    if not isinstance(positions, Tensor) or not isinstance(mask, Tensor) or positions.device.type == "meta":
        return
    if positions.dim() != 2 or mask.dim() != 2 or positions.shape[1] != mask.shape[1]:
        return
    both = mask[:, 1:].bool() & mask[:, :-1].bool()  # padding has any positions
    if bool(torch.any((positions[:, 1:] <= positions[:, :-1]) & both)):
        message = f"{POSITIONS} begin anew in a row that has an {MASK} too: tokens attend to the texts before theirs"
        warn("GC120", message, hint=f"leave {MASK} out of packed batches", stacklevel=6)
