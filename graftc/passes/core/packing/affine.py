"""8-bit and 4-bit integers with a scale, and an optional zero point, for each group of inputs in a row: torchao's
``int8`` and grouped ``int4`` weights, and those of GPTQ, AWQ and compressed-tensors, converted to the same layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor

from graftc.passes.core.packing.blockwise import pairs_by_byte
from graftc.passes.core.packing.forms import EvenSteps
from graftc.passes.core.packing.packing import Packing, as_bytes, from_bytes, real_values


@dataclass(frozen=True)
class Affine(Packing):
    """``(code - zero) * scale``, computed in the weight's dtype, or in that of `via`.

    ``int8``: codes from -128 to 127, symmetric. ``int8z``: the same with zero points. ``int4``: codes and zero points
    from 0 to 15.

    Attributes:
        group: the number of consecutive inputs in a row that share a scale; 0 means all of them. The last group may be
            shorter.
        parts: ``codes``, ``[..., rows, in]``, or for 4 bits ``[..., rows, ceil(in / 2)]`` with the first of two codes
            in a byte's lower half; ``scales``, as bytes of float32 or of the `via` dtype, ``[..., rows, groups *
            bytes]``; except for ``int8`` also ``zeros``, ``[..., rows, groups]``.
    """

    group: int = 0

    KINDS: ClassVar[tuple[str, ...]] = ("int8", "int8z", "int4")
    HAS_FORM: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("codes", "scales") if self.kind == "int8" else ("codes", "scales", "zeros")

    @property
    def is_wide(self) -> bool:
        """Whether codes are signed 8-bit integers."""
        return self.kind.startswith("int8")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight; scales are chosen so that codes cover zero and all values in the group."""
        width = weight.shape[-1]
        grouped = _grouped(weight, self.group)
        low, high = (-128, 127) if self.is_wide else (0, 15)
        least, most = grouped.amin(-1, keepdim=True).clamp(max=0), grouped.amax(-1, keepdim=True).clamp(min=0)
        tiny = torch.finfo(weight.dtype).smallest_normal
        if self.kind == "int8":
            scale = (torch.maximum(-least, most) / ((high - low) / 2)).clamp(min=tiny)
            zero = torch.zeros_like(scale)
        else:
            scale = ((most - least) / (high - low)).clamp(min=tiny)
            zero = (low - torch.round(least / scale)).clamp(low, high)
        code = torch.clamp(torch.round(grouped * (1 / scale)) + zero, low, high)
        stored = torch.int8 if self.is_wide else torch.uint8
        codes, zeros = (part.to(stored).view(torch.uint8) for part in (code.flatten(-2)[..., :width], zero.squeeze(-1)))
        scales = as_bytes(scale.squeeze(-1).to(self.scales_type))
        parts = codes if self.is_wide else halves(codes), scales, zeros
        return parts[: len(self.parts)]

    def keeping(self, packed: Sequence[Tensor], parts: Sequence[Tensor], same: Tensor) -> Sequence[Tensor]:
        """Return the new parts, but the old ones for rows in which no value has changed."""
        rows = same.all(-1, keepdim=True)
        return [torch.where(rows, old, new) for old, new in zip(parts, packed, strict=True)]

    def form(self, parts: Sequence[Tensor], shape: Sequence[int]) -> EvenSteps:
        """Return the weight as evenly spaced values, with unsigned codes and zero points."""
        width = shape[-2] if self.transposed else shape[-1]
        scales, group = from_bytes(parts[1], self.scales_type).float(), self.group or width
        if self.is_wide:
            return EvenSteps(8, parts[0] ^ 128, scales, None if self.kind == "int8" else parts[2] ^ 128, group)
        return EvenSteps(4, from_halves(parts[0], width), scales, parts[2], group)

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute ``(code - zero) * scale`` in each group."""
        scales = from_bytes(parts[1], self.scales_type).to(dtype)
        grouped = _grouped(self.numbers(parts[0], shape[-1], dtype), self.group)
        if self.kind != "int8":
            grouped = grouped - self.zeros(parts[2], dtype).unsqueeze(-1)
        return (grouped * scales.unsqueeze(-1)).flatten(-2)[..., : shape[-1]].reshape(tuple(shape))

    def run(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the same values as `unpack`, computed in place for float32 if all groups are complete."""
        width = shape[-1]
        if width % (self.group or width) or width % 2 or dtype != torch.float32 or self.via:
            return self.unpack(parts, shape, dtype)
        codes, scales = parts[0], from_bytes(parts[1])
        values = self.numbers(codes, width, dtype) if self.is_wide else pairs_by_byte(_pairs(), codes)
        grouped = values.view(*shape[:-1], -1, self.group or width)
        if self.kind != "int8":
            grouped.sub_(self.zeros(parts[2], dtype).unsqueeze(-1))
        return grouped.mul_(scales.unsqueeze(-1)).view(tuple(shape))

    def numbers(self, codes: Tensor, width: int, dtype: torch.dtype) -> Tensor:
        """Return the codes as values of ``dtype``, ``[..., rows, width]``."""
        return self.zeros(codes if self.is_wide else from_halves(codes, width), dtype)

    def zeros(self, zeros: Tensor, dtype: torch.dtype) -> Tensor:
        """Return zero points, or codes stored one per byte, as values of ``dtype``."""
        return (zeros.view(torch.int8) if self.is_wide else zeros).to(dtype)


def halves(codes: Tensor) -> Tensor:
    """Pack pairs of 4-bit codes along the last axis into bytes, the first code in the lower half."""
    pairs = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return pairs[..., ::2] | (pairs[..., 1::2] << 4)


def from_halves(codes: Tensor, width: int) -> Tensor:
    """Return the codes packed by `halves`, ``width`` of them along the last axis."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :width]


@cache
def _pairs() -> Tensor:
    """Return the two codes in each possible byte, ``float32[256, 2]``."""
    with real_values():
        byte = torch.arange(256)
        return torch.stack([byte & 15, byte >> 4], dim=1).float()


def _grouped(values: Tensor, group: int) -> Tensor:
    """Reshape ``[..., in]`` to ``[..., groups, group]``, padded with zeros at the end."""
    width = values.shape[-1]
    group = group or width
    if width % group:
        values = torch.nn.functional.pad(values, (0, -width % group))
    return values.reshape(*values.shape[:-1], -1, group)
