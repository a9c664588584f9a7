"""Small floating-point numbers with a scale for each block of rows and columns: FP8 (e4m3, Micikevicius et al., "FP8
Formats for Deep Learning", 2022, arXiv:2209.05433) and MXFP4 (e2m1 with e8m0 scales for 32 values, OCP Microscaling
Formats 1.0, arXiv:2310.10537).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import halves
from graftc.passes.core.packing.packing import Packing, as_bytes, from_bytes, real_values

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""The values of e2m1, by code."""

_LARGEST = {"e4m3": 448.0, "e2m1": 6.0}
_E2M1_EXPONENT = 2
"""Exponent of the largest e2m1 value."""

_EXPONENT_BIAS = 127


@cache
def _by_byte(kind: str) -> list[list[float]]:
    """Return the values that each possible byte represents."""
    with real_values():
        byte = torch.arange(256, dtype=torch.uint8)
        if kind == "e4m3":
            return byte.view(torch.float8_e4m3fn).float().unsqueeze(1).tolist()
        if kind == "e8m0":
            return [[2.0 ** (code - _EXPONENT_BIAS)] if code < 255 else [float("nan")] for code in range(256)]
        return [[E2M1[code & 15], E2M1[code >> 4]] for code in range(256)]


def _values(codes: Tensor, kind: str) -> Tensor:
    """Decode ``uint8[..., bytes]`` to ``float32[..., width]``."""
    table = torch.tensor(_by_byte(kind), dtype=torch.float32, device=codes.device)
    return torch.nn.functional.embedding(codes.int(), table).flatten(-2)


@dataclass(frozen=True)
class Floating(Packing):
    """``value(code) * scale``, computed in the weight's dtype, or in that of `via`.

    Attributes:
        rows, group: the numbers of rows and inputs in a block; 0 means all. The last blocks may be smaller.
        exponents: whether scales are powers of two, stored as e8m0.
        parts: ``codes``, ``[..., rows, in]``, or for 4 bits ``[..., rows, in / 2]`` with the first of two codes in a
            byte's lower half; ``scales``, one per block, as bytes of float32 or of the `via` dtype, or as exponents,
            ``[..., row blocks, blocks * bytes]``.
    """

    rows: int = 1
    group: int = 0
    exponents: bool = False

    KINDS = ("e4m3", "e2m1")
    parts = ("codes", "scales")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight.

        A scale is the block's largest absolute value divided by the format's largest value; exponents follow the
        Microscaling paper.
        """
        blocks = self._blocks(weight.float())
        largest = blocks.abs().amax(dim=(-3, -1), keepdim=True).clamp(min=2.0**-100)
        if self.exponents:
            span = _E2M1_EXPONENT if self.kind == "e2m1" else 8
            exponent = torch.floor(torch.log2(largest)) - span
            scale, stored = torch.exp2(exponent), (exponent + _EXPONENT_BIAS).to(torch.uint8)
        else:
            scale = (largest / _LARGEST[self.kind]).to(self.scales_type)
            stored, scale = scale, scale.float()
        scaled = self._whole(blocks / scale, weight.shape).clamp(-_LARGEST[self.kind], _LARGEST[self.kind])
        stored = stored.squeeze(-1).squeeze(-2)
        scales = stored if self.exponents else as_bytes(stored)
        if self.kind == "e4m3":
            return scaled.to(torch.float8_e4m3fn).view(torch.uint8), scales
        table = torch.tensor(E2M1[:8], device=weight.device)
        codes = torch.bucketize(scaled.abs(), (table[1:] + table[:-1]) / 2).to(torch.uint8)
        codes = codes | (torch.signbit(scaled).to(torch.uint8) << 3)
        return halves(codes), scales

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the values of the codes times the scales of their blocks."""
        scales = _values(parts[1], "e8m0") if self.exponents else from_bytes(parts[1], self.scales_type)
        blocks = self._blocks(_values(parts[0], self.kind).to(dtype))
        scaled = blocks * scales.to(dtype).unsqueeze(-1).unsqueeze(-3)
        return self._whole(scaled, shape).reshape(tuple(shape))

    def _blocks(self, values: Tensor) -> Tensor:
        """Reshape ``[..., rows, in]`` to ``[..., row blocks, rows, blocks, group]``, padded with zeros."""
        height, width = values.shape[-2:]
        rows, group = self.rows or height, self.group or width
        if width % group or height % rows:
            values = torch.nn.functional.pad(values, (0, -width % group, 0, -height % rows))
        return values.reshape(*values.shape[:-2], values.shape[-2] // rows, rows, values.shape[-1] // group, group)

    def _whole(self, blocks: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight with this shape from its blocks: the inverse of `_blocks`."""
        return blocks.flatten(-2).flatten(-3, -2)[..., : shape[-2], : shape[-1]]
