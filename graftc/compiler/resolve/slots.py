"""The stored names of a bank's slots, and which adaptations slots can contain."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graftc.specs.base import MethodSpec
from graftc.specs.compose import Bank, CompositionSpec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.methods.lora import LoRA

NAMES = "names"
"""Part name of the buffer that contains the names of a bank's slots, as ``uint8[slots, NAME_BYTES]``."""

NAME_BYTES = 128
"""The maximum length of the name of a slot, in bytes of UTF-8."""

_PLAIN = ("kaiming", "gaussian", "random", "orthogonal")
"""Initialisers whose adaptation is ``s B A`` alone, with nothing subtracted from the weight."""


def slot_count(composition: CompositionSpec | None) -> int | None:
    """Return the number of slots of a bank to which adapters can be added; None for every other composition."""
    return composition.size if isinstance(composition, Bank) and composition.slots is not None else None


def encoded(names: Sequence[str | None], device: torch.device | str = "cpu") -> Tensor:
    """Return the names of slots as ``uint8[slots, NAME_BYTES]``; a row of zeros stands for an empty slot."""
    rows = [list((name or "").encode().ljust(NAME_BYTES, b"\0")) for name in names]
    return torch.tensor(rows, dtype=torch.uint8, device=device)


def decoded(names: Tensor) -> list[str | None]:
    """Return the names of slots from the tensor that `encoded` returns."""
    rows = (bytes(row).rstrip(b"\0") for row in names.tolist())
    return [row.decode(errors="replace") or None for row in rows]


def check_slot_name(name: object) -> str:
    """Return the name of a slot.

    Raises:
        GraftError: GC002 if it is not a text of 1 to `NAME_BYTES` bytes without control characters.
    """
    if not isinstance(name, str) or not name.isprintable() or not 0 < len(name.encode(errors="replace")) <= NAME_BYTES:
        what = quoted(name, 40) if isinstance(name, str) else repr(name)
        raise GraftError("GC002", f"{what} is not a name of a slot", hint=f"use 1 to {NAME_BYTES} printable bytes")
    return name


def unslotted(spec: MethodSpec) -> str | None:
    """Return why an adaptation cannot be in a slot; None if it can."""
    if type(spec) is not LoRA:
        return f"slots contain lora, not {spec.method}"
    if spec.init not in _PLAIN:
        return f"init: {spec.init} subtracts factors of the weight, which an added adapter does not have"
    if spec.bias != "none":
        return f"bias: {spec.bias} trains biases, which all slots would share"
    return None
