"""The memory that a training step takes, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from graftc.applications.planner.sizes import shown


@dataclass(frozen=True)
class MemoryPlan:
    """The memory that training takes on each device, in bytes, computed without running it.

    ``peak`` is the greater of two sums: all that stays, with the forward and backward pass (``step``) and FSDP2's
    buffers (``communication``); or all that stays, with ``gradients`` and what a step of the optimiser takes
    (``update``).

    Attributes:
        batch: the rows on each device.
        sequence: the tokens of each row; None for models without sequences.
        dtype: the dtype of the base.
        checkpoint: whether layers are computed again in the backward pass.
        optimizer: the name of the optimiser.
        devices: the number of devices that share parameters, gradients and state (FSDP2).
        device: the kind of device.
        frozen: parameters that do not train.
        originals: those frozen parameters that trained copies replace (``train``, ``full``, biases) and that stay
            beside the copies.
        trainable: parameters that train.
        buffers: tensors that are not parameters, such as indices of sparse deltas.
        inputs: the tensors of the batch.
        gradients: the gradients of everything that trains.
        optimizer_state: what the optimiser keeps from one step to the next.
        saved: activations that are kept for the backward pass.
        step: what the forward and backward pass take at their peak, beyond all that stays: activations, gradients so
            far, and temporary tensors; with the gradients of earlier micro-batches if gradients are accumulated.
        communication: whole tensors of gathered layers, and gradients that are being sent, under FSDP2.
        update: what a step of the optimiser takes at its peak, beyond state and gradients.
        budget: the bytes that are available; None if no budget was given.
        largest_batch: the largest batch of such sequences within the budget; 0 if there is none.
        largest_sequence: the longest sequences of such a batch within the budget, in steps of 64 tokens, or as long as
            the model takes; 0 if there are none.
    """

    batch: int
    sequence: int | None
    dtype: str
    checkpoint: bool
    optimizer: str
    devices: int
    device: str
    frozen: int
    originals: int
    trainable: int
    buffers: int
    inputs: int
    gradients: int
    optimizer_state: int
    saved: int
    step: int
    communication: int
    update: int
    budget: int | None = None
    largest_batch: int | None = None
    largest_sequence: int | None = None

    @property
    def resident(self) -> int:
        """Bytes that stay from one step to the next."""
        return self.frozen + self.trainable + self.buffers + self.inputs + self.optimizer_state

    @property
    def peak(self) -> int:
        """Bytes at the highest point of a training step."""
        return self.resident + max(self.step + self.communication, self.gradients + self.update)

    @property
    def fits(self) -> bool | None:
        """Whether the peak is within the budget; None if there is no budget."""
        return None if self.budget is None else self.peak <= self.budget

    def to_json(self) -> dict[str, Any]:
        """Return the sizes as plain values."""
        return {**asdict(self), "resident": self.resident, "peak": self.peak, "fits": self.fits}

    def __str__(self) -> str:
        of = f"batch {self.batch}" + ("" if self.sequence is None else f" x {self.sequence} tokens")
        how = ", ".join([of, self.dtype, self.optimizer, *(["checkpointing"] if self.checkpoint else [])])
        each = f" on each of {self.devices} devices (FSDP2)" if self.devices > 1 else ""
        lines = [f"peak {shown(self.peak)}{each}: {how}"]
        lines += [f"  {name + ':':<27}{shown(size):>12}" for name, size in self.parts()]
        if self.budget is not None:
            verdict = "fits" if self.fits else "does not fit"
            largest = f"largest batch {self.largest_batch}"
            if self.largest_sequence is not None:
                largest += f", longest sequence {self.largest_sequence}"
            lines.append(f"  {verdict} in {shown(self.budget)}; {largest}")
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
