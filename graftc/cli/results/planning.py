"""Results of ``graftc check --memory``."""

from __future__ import annotations

from pydantic import Field

from graftc.cli.results.base import Result
from graftc.specs.base_model import Items

__all__ = ["FitData", "MemoryData", "PlanData"]


class PlanData(Result):
    """What training takes on each device, in bytes."""

    batch: int = Field(ge=1)
    """Rows of each device."""

    sequence: int | None = Field(ge=0)
    """Tokens of each row; null for models without sequences."""

    dtype: str
    """Type of the base."""

    checkpoint: bool
    """Whether layers are computed again in the backward pass."""

    optimizer: str
    """Name of the optimiser."""

    devices: int = Field(ge=1)
    """How many share parameters, gradients and state (FSDP2)."""

    device: str
    """What kind they are."""

    frozen: int = Field(ge=0)
    """Parameters that do not train."""

    originals: int = Field(ge=0)
    """Those of them that trained copies stand in for."""

    trainable: int = Field(ge=0)
    """Parameters that do."""

    buffers: int = Field(ge=0)
    """Tensors that are no parameters."""

    inputs: int = Field(ge=0)
    """The batch."""

    gradients: int = Field(ge=0)
    """Of everything that trains."""

    optimizer_state: int = Field(ge=0)
    """What the optimiser keeps."""

    saved: int = Field(ge=0)
    """Activations that are kept for the backward pass."""

    step: int = Field(ge=0)
    """Forward and backward pass at their peak, over all that stays: activations, gradients so far, what is computed
    with."""

    communication: int = Field(ge=0)
    """FSDP2's buffers."""

    update: int = Field(ge=0)
    """A step of the optimiser at its peak, over state and gradients."""

    resident: int = Field(ge=0)
    """What stays from one step to the next."""

    peak: int = Field(ge=0)
    """The highest point of a training step."""

    budget: int | None = Field(ge=1)
    """Bytes that there are; null where none were given."""

    fits: bool | None
    """Whether the peak is within the budget; null where there is none."""

    largest_batch: int | None = Field(ge=0)
    """The largest batch of such sequences within the budget."""

    largest_sequence: int | None = Field(ge=0)
    """The longest sequences of such a batch within the budget."""


class FitData(Result):
    """One way to train."""

    method: str
    """Its name, as in `--methods`."""

    quantize: str | None
    """How the base is stored; null as it is."""

    checkpoint: bool
    """Whether layers are computed again in the backward pass."""

    chunked: bool
    """Whether head and loss are computed some rows at a time."""

    plan: PlanData | None
    """What it takes; null where it cannot be done."""

    reason: str
    """Why it cannot."""


class MemoryData(Result):
    """What training takes, and what fits."""

    plan: PlanData
    """For the spec."""

    table: Items[FitData]
    """With `--methods`, other ways to train."""
