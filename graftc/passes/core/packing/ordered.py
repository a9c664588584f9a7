"""Integers whose groups consist of arbitrary inputs instead of consecutive ones: GPTQ with ``desc_act`` (Frantar et
al., "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers", 2023, arXiv:2210.17323), which
quantises inputs in the order of their activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.packing import as_bytes, from_bytes


@dataclass(frozen=True)
class Ordered(Affine):
    """`Affine` with zero points, and with an additional part that contains the group of each input.

    Attributes:
        parts: those of `Affine`, and ``groups``, as bytes of int32, ``[1, in * 4]``.
    """

    KINDS = ("int8_ordered", "int4_ordered")
    HAS_FORM = False
    parts = ("codes", "scales", "zeros", "groups")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight, grouping consecutive inputs."""
        alike = Affine("int8z" if self.is_wide else "int4", self.group, via=self.via)
        width = weight.shape[-1]
        groups = torch.arange(width, device=weight.device) // (self.group or width)
        return *alike.pack(weight), as_bytes(groups.to(torch.int32).unsqueeze(0))

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Compute ``(code - zero) * scale`` with the scale and zero point of each input's group."""
        groups = from_bytes(parts[3], torch.int32).reshape(-1)
        scales = from_bytes(parts[1], self.scales_type).to(dtype).index_select(-1, groups)
        zeros = self.zeros(parts[2], dtype).index_select(-1, groups)
        return ((self.numbers(parts[0], shape[-1], dtype) - zeros) * scales).reshape(tuple(shape))

    def run(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Call `unpack`: there is no faster way."""
        return self.unpack(parts, shape, dtype)

    def keeping(self, packed: Sequence[Tensor], parts: Sequence[Tensor], same: Tensor) -> Sequence[Tensor]:
        """Return only new parts: they group consecutive inputs, and all rows must have the same groups."""
        return packed
