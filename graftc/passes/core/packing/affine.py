"""Integers of 8 or 4 bits with a scale, and a zero point if they have one, for each group of inputs of a row: torchao's
``int8`` and grouped ``int4`` weights, and those of GPTQ, AWQ and compressed-tensors, laid out alike.
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
    """``(code - zero) * scale``, computed in the element type of the weight, or of `via`.

    ``int8``: codes from -128 to 127, symmetric. ``int8z``: the same with zero points. ``int4``: codes and zero points
    from 0 to 15.

    Attributes:
        group: the number of consecutive inputs of a row that share a scale; 0 means all of them. The last group may be
            shorter.
        parts: ``codes`` ``[..., rows, in]``, of 4 bits ``[..., rows, ceil(in / 2)]`` with the first of two in the lower
            half of a byte; ``scales``, bytes of float32 or of `via`, ``[..., rows, groups * bytes]``; except for
            ``int8``, ``zeros`` ``[..., rows, groups]``.
    """

    group: int = 0

    KINDS: ClassVar[tuple[str, ...]] = ("int8", "int8z", "int4")
    HAS_FORM: ClassVar[bool] = True

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("codes", "scales") if self.kind == "int8" else ("codes", "scales", "zeros")

    @property
    def is_wide(self) -> bool:
        """Whether codes have 8 bits and are signed."""
        return self.kind.startswith("int8")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight; scales span zero and the values of a group."""
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
        """Keep the rows in which no value has changed."""
        rows = same.all(-1, keepdim=True)
        return [torch.where(rows, old, new) for old, new in zip(parts, packed, strict=True)]

    def form(self, parts: Sequence[Tensor], shape: Sequence[int]) -> EvenSteps:
        """Return the codes and zero points as unsigned integers in even steps."""
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
        """Return the values of `unpack`, computed in place for float32 and whole groups."""
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
        """Return the codes as numbers, ``[..., rows, width]``."""
        return self.zeros(codes if self.is_wide else from_halves(codes, width), dtype)

    def zeros(self, zeros: Tensor, dtype: torch.dtype) -> Tensor:
        """Return zero points as numbers, or codes of which each has a byte."""
        return (zeros.view(torch.int8) if self.is_wide else zeros).to(dtype)


def halves(codes: Tensor) -> Tensor:
    """Pack two 4-bit codes into each byte along the last axis, the first in the lower half."""
    pairs = torch.nn.functional.pad(codes, (0, codes.shape[-1] % 2))
    return pairs[..., ::2] | (pairs[..., 1::2] << 4)


def from_halves(codes: Tensor, width: int) -> Tensor:
    """Return the codes that `halves` has packed, ``width`` of them along the last axis."""
    return torch.stack([codes & 15, codes >> 4], dim=-1).flatten(-2)[..., :width]


@cache
def _pairs() -> Tensor:
    """Return the numbers of both codes of each byte, ``float32[256, 2]``."""
    with real_values():
        byte = torch.arange(256)
        return torch.stack([byte & 15, byte >> 4], dim=1).float()


def _grouped(values: Tensor, group: int) -> Tensor:
    """Reshape ``[..., in]`` to ``[..., groups, group]``, with zeros after the last ones."""
    width = values.shape[-1]
    group = group or width
    if width % group:
        values = torch.nn.functional.pad(values, (0, -width % group))
    return values.reshape(*values.shape[:-1], -1, group)
