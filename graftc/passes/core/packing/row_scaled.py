"""8-bit codes scaled by the largest absolute value of each row: LLM.int8 (Dettmers et al., "LLM.int8(): 8-bit Matrix
Multiplication for Transformers at Scale", 2022, arXiv:2208.07339), as stored by bitsandbytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.packing.packing import Packing, as_bytes, from_bytes

STEP = 7.874015718698502e-3
"""1 / 127, with the value used by bitsandbytes."""


@dataclass(frozen=True)
class RowScaled(Packing):
    """``code * largest * STEP``, computed in this order and in float32.

    Attributes:
        parts: ``codes``, ``[rows, in]``, from -127 to 127; ``scales``, as bytes of float32, ``[rows, 4]``.
    """

    KINDS = ("int8_rows",)
    parts = ("codes", "scales")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Round the values of each row to 8 bits, relative to the row's largest absolute value."""
        values = weight.float()
        largest = values.abs().amax(-1, keepdim=True)
        codes = torch.round(values * (127 / largest.clamp(min=1e-38))).clamp(-127, 127)
        return codes.to(torch.int8).view(torch.uint8), as_bytes(largest)

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Scale the codes of each row by the row's largest absolute value."""
        codes, largest = parts[0].view(torch.int8).float(), from_bytes(parts[1])
        return (codes * largest * STEP).to(dtype).reshape(tuple(shape))
