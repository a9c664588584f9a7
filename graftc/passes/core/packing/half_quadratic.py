"""Integers with fractional zero points: HQQ (Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning
Models", 2023).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import from_halves, halves
from graftc.passes.core.packing.packing import Packing, as_bytes, from_bytes


@dataclass(frozen=True)
class HalfQuadratic(Packing):
    """``(code - zero) * scale``. Codes are integers from 0, in 8 or 4 bits each.

    Attributes:
        group: the number of values that share a scale, over the whole weight; 0 means a row, or with ``across`` a
            column.
        across: if true, the values of a group are in one column of the weight as ``[group, rest]``, instead of in one
            row of it as ``[rest, group]``: ``axis=0`` in HQQ.
        parts: ``codes`` ``[rows, in]``, of 4 bits ``[rows, ceil(in / 2)]`` with the first of two in the lower half of a
            byte; ``scales`` and ``zeros``, bytes of float32 or of `via`, ``[groups, bytes]``.
    """

    group: int = 0
    across: bool = False

    KINDS = ("hqq8", "hqq4")
    parts = ("codes", "scales", "zeros")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight; scales span the values of a group, without HQQ's search for better ones."""
        grouped, axis = self._grouped(weight)
        least, most = grouped.amin(axis, keepdim=True), grouped.amax(axis, keepdim=True)
        levels = 255 if self.kind == "hqq8" else 15
        scale = ((most - least) / levels).clamp(min=torch.finfo(weight.dtype).smallest_normal)
        zero = -least / scale
        codes = torch.round(grouped / scale + zero).clamp(0, levels).to(torch.uint8).reshape(weight.shape)
        stored = [as_bytes(part.to(self.scales_type).reshape(-1, 1)) for part in (scale, zero)]
        return codes if self.kind == "hqq8" else halves(codes), *stored

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute ``(code - zero) * scale`` in each group."""
        codes = parts[0]
        if self.kind == "hqq4":
            codes = from_halves(codes, shape[-1])
        grouped, axis = self._grouped(codes.reshape(tuple(shape)).to(dtype))
        scales, zeros = (from_bytes(part, self.scales_type).to(dtype).reshape(-1).unsqueeze(axis) for part in parts[1:])
        return ((grouped - zeros) * scales).reshape(tuple(shape))

    def _grouped(self, values: Tensor) -> tuple[Tensor, int]:
        """Return values by groups, and the axis along which the values of a group lie."""
        rows, width = values.shape
        if self.across:
            return values.reshape(self.group or rows, -1), 0
        return values.reshape(-1, self.group or width), 1
