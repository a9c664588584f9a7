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
    """``(code - zero) * scale``, where codes are unsigned integers of 8 or 4 bits.

    Attributes:
        group: the number of values that share a scale; 0 means a row, or a column with ``across``.
        across: whether a group is one column of the weight reshaped to ``[group, rest]`` (``axis=0`` in HQQ) instead of
            one row of the weight reshaped to ``[rest, group]``.
        parts: ``codes``, ``[rows, in]``, or for 4 bits ``[rows, ceil(in / 2)]`` with the first of two codes in a byte's
            lower half; ``scales`` and ``zeros``, as bytes of float32 or of the `via` dtype, ``[groups, bytes]``.
    """

    group: int = 0
    across: bool = False

    KINDS = ("hqq8", "hqq4")
    parts = ("codes", "scales", "zeros")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight; scales span a group's range of values, without HQQ's search for better ones."""
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
        """Reshape values into groups; also return the axis along which the values of a group lie."""
        rows, width = values.shape
        if self.across:
            return values.reshape(self.group or rows, -1), 0
        return values.reshape(-1, self.group or width), 1
