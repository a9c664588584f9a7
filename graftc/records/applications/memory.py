"""The memory that a training step takes, and what fits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from graftc.records.fields import Recomputed
from graftc.specs.errors.text import size_text
from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class MemoryPlan(Record, published="PlanData", behind={"update": ("resident", "peak"), "budget": ("fits",)}):
    """The memory that training takes on each device, in bytes."""

    batch: Annotated[int, Ge(1)]
    """Rows of each device."""

    sequence: Annotated[int | None, Ge(0)]
    """Tokens of each row; null for models without sequences."""

    dtype: str
    """Type of the base."""

    checkpoint: Recomputed

    optimizer: str
    """Name of the optimiser."""

    devices: Annotated[int, Ge(1)]
    """How many share parameters, gradients and state (FSDP2)."""

    device: str
    """The kind of device."""

    frozen: Annotated[int, Ge(0)]
    """Parameters that do not train."""

    originals: Annotated[int, Ge(0)]
    """Those of them that trained copies stand in for."""

    trainable: Annotated[int, Ge(0)]
    """Parameters that do."""

    buffers: Annotated[int, Ge(0)]
    """Tensors that are no parameters."""

    inputs: Annotated[int, Ge(0)]
    """The batch."""

    gradients: Annotated[int, Ge(0)]
    """Of everything that trains."""

    optimizer_state: Annotated[int, Ge(0)]
    """State of the optimiser."""

    saved: Annotated[int, Ge(0)]
    """Activations that are kept for the backward pass."""

    step: Annotated[int, Ge(0)]
    """Forward and backward pass at their peak, over all that stays: activations, gradients so far, what is computed
    with."""

    communication: Annotated[int, Ge(0)]
    """FSDP2's buffers."""

    update: Annotated[int, Ge(0)]
    """A step of the optimiser at its peak, over state and gradients."""

    budget: Annotated[int | None, Ge(1)] = None
    """Bytes that there are; null where none were given."""

    largest_batch: Annotated[int | None, Ge(0)] = None
    """The largest batch of such sequences within the budget."""

    largest_sequence: Annotated[int | None, Ge(0)] = None
    """The longest sequences of such a batch within the budget."""

    @stated
    def resident(self) -> Annotated[int, Ge(0)]:
        """The memory that stays in use from one step to the next."""
        return self.frozen + self.trainable + self.buffers + self.inputs + self.optimizer_state

    @stated
    def peak(self) -> Annotated[int, Ge(0)]:
        """The highest point of a training step."""
        return self.resident + max(self.step + self.communication, self.gradients + self.update)

    @stated
    def fits(self) -> bool | None:
        """Whether the peak is within the budget; null where there is none."""
        return None if self.budget is None else self.peak <= self.budget

    def __str__(self) -> str:
        of = f"batch {self.batch}" + ("" if self.sequence is None else f" x {self.sequence} tokens")
        how = ", ".join([of, self.dtype, self.optimizer, *(["checkpointing"] if self.checkpoint else [])])
        each = f" on each of {self.devices} devices (FSDP2)" if self.devices > 1 else ""
        lines = [f"peak {size_text(self.peak)}{each}: {how}"]
        lines += [f"  {name + ':':<27}{size_text(size):>12}" for name, size in self.parts()]
        if self.budget is not None:
            verdict = "fits" if self.fits else "does not fit"
            largest = f"largest batch {self.largest_batch}"
            if self.largest_sequence is not None:
                largest += f", longest sequence {self.largest_sequence}"
            lines.append(f"  {verdict} in {size_text(self.budget)}; {largest}")
        return "\n".join(lines)

    def parts(self) -> list[tuple[str, int]]:
        """Return the sizes to print, with their names."""
        return [
            ("frozen parameters", self.frozen),
            ("  originals of trained", self.originals),
            ("trainable parameters", self.trainable),
            ("buffers and inputs", self.buffers + self.inputs),
            ("optimizer state", self.optimizer_state),
            ("forward and backward", self.step),
            ("  saved activations", self.saved),
            ("  gradients", self.gradients),
            ("FSDP2 buffers", self.communication),
            ("optimizer step", self.update),
        ]


@dataclass(frozen=True)
class FitRow(Record, published="FitData"):
    """One way to train."""

    method: str
    """Its name, as in `--methods`."""

    quantize: str | None
    """How the base is stored; null as it is."""

    checkpoint: Recomputed

    chunked: bool
    """Whether head and loss are computed some rows at a time."""

    plan: MemoryPlan | None
    """The memory that it takes; null where it cannot be done."""

    reason: str = ""
    """Why it cannot."""


@dataclass(frozen=True)
class PlannedMemory(Record, published="MemoryData"):
    """The memory that training takes, for a spec and for other ways to train."""

    plan: MemoryPlan
    """For the spec."""

    table: tuple[FitRow, ...]
    """With `--methods`, other ways to train."""
