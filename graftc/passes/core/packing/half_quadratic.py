"""Whole numbers with fractional zero points: HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large
Machine Learning Models", 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import from_halves, halves
from graftc.passes.core.packing.packing import Packing, as_bytes, from_bytes


@dataclass(frozen=True)
class HalfQuadratic(Packing):
    """``(code - zero) * scale``. Codes are whole numbers from 0, in 8 or 4 bits each.

    Attributes:
        group: how many values share a scale, over the whole weight; 0 is a row, or with ``across`` a column.
        across: the values of a group are the ones in the same column of the weight as ``[group, rest]``, not those in a
            row of it as ``[rest, group]``: ``axis=0`` there.
        parts: ``codes`` ``[rows, in]``, of 4 bits ``[rows, ceil(in / 2)]`` with the first of two in the lower half of a
            byte; ``scales`` and ``zeros``, bytes of float32 or of `via`, ``[groups, bytes]``.
    """

    group: int = 0
    across: bool = False

    KINDS = ("hqq8", "hqq4")
    parts = ("codes", "scales", "zeros")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """See `Packing.pack`. Scales span the values of a group; HQQ's search for better ones is not done."""
        grouped, axis = self._grouped(weight)
        least, most = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        levels = 255 if self.kind == "hqq8" else 15
        scale = ((most - least) / levels).clamp(min=torch.finfo(weight.dtype).smallest_normal)
        zero = -least / scale
        codes = torch.round(grouped / scale + zero).clamp(0, levels).to(torch.uint8).reshape(weight.shape)
        stored = [as_bytes(part.to(self.scales_type).reshape(-1, 1)) for part in (scale, zero)]
        return codes if self.kind == "hqq8" else halves(codes), *stored

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """See `Packing.unpack`."""
        codes = parts[0]
        if self.kind == "hqq4":
            codes = from_halves(codes, shape[-1])
        grouped, axis = self._grouped(codes.reshape(tuple(shape)).to(dtype))
        scales, zeros = (from_bytes(part, self.scales_type).to(dtype).reshape(-1).unsqueeze(axis) for part in parts[1:])
        return ((grouped - zeros) * scales).reshape(tuple(shape))

    def _grouped(self, values: Tensor) -> tuple[Tensor, int]:
        """Values by groups, and the axis along which those of a group are."""
        rows, width = values.shape
        if self.across:
            return values.reshape(self.group or rows, -1), 0
        return values.reshape(-1, self.group or width), 1
