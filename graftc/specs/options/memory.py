"""Options of a spec for what a training step may keep in memory."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftc.specs.base import SpecModel


class MemoryOptions(SpecModel):
    """The values that a training step keeps for its backward pass. Nothing here changes what a model computes."""

    loss: Literal["whole", "chunked", "auto"] = "whole"
    """`chunked`: a language model's head and loss are computed a few rows at a time, so that logits are never there as
    a whole, and training outputs have none. `auto`: the same where logits would be large beside the rest."""

    budget: float | None = Field(default=None, gt=0, le=1)
    """Bytes of activations to keep, as a part of those that are kept without a budget. What is kept and what is
    computed again is chosen by bytes and cost."""

    offload: bool = False
    """Hold what is kept in the host's memory, where the model is on another device."""
