"""Files that a command wrote, and tensors in a PEFT checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge

from graftc.specs.records.record import Record


@dataclass(frozen=True)
class WrittenFile(Record, published="FileData"):
    """A file that was written, or would be."""

    path: str
    """Where it is, `out` included."""

    bytes: Annotated[int, Ge(0)]
    """Its size."""


@dataclass(frozen=True)
class PeftTensor(Record):
    """A tensor of a PEFT checkpoint and the one that it is here."""

    key: str
    """Its key in `adapter_model.safetensors`."""

    site: str
    """The adapted site; empty for a tensor of the adaptation as a whole."""

    part: str
    """Its part in the adaptation, such as `A`."""

    tensor: str
    """Full name of the tensor in the compiled model."""
