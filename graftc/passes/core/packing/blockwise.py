"""4-bit indices into a table, with one scale for each block of consecutive values: NF4 and FP4, as in bitsandbytes.

NF4's values are quantiles of a normal distribution (Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs",
2023, arXiv:2305.14314); its "double quantisation" stores the scales in 8 bits, with a second-level scale for every 256
of them.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import torch
from torch import Tensor

from graftc.passes.core.packing.forms import TableEntries
from graftc.passes.core.packing.packing import Packing, as_bytes, from_bytes, real_values

# fmt: off
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)
"""The values of NF4, by code."""
# fmt: on

_FP4 = (0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""The values of the FP4 codes without the sign bit, in twelfths."""

SCALES = 256
"""Number of 8-bit scales that share a second-level scale."""

_EXPONENTS = 7
"""Number of decades that 8-bit scales span; see `dynamic_values`."""


def table_of(kind: str) -> Tensor:
    """Return the values of the 16 codes, ``float32[16]`` on the CPU."""
    if kind == "nf4":
        return torch.tensor(NF4)
    half = torch.tensor(_FP4)
    return torch.cat([half, -half]) / half.max()


def dynamic_values() -> Tensor:
    """Return the 256 possible values of an 8-bit scale, ascending, ``float32`` on the CPU.

    They are the midpoints of equal intervals in each of seven decades, each decade having twice as many intervals as
    the one below (Dettmers, "8-Bit Approximations for Parallelism in Deep Learning", 2016, arXiv:1511.04561).
    """
    values = [0.0, 1.0]
    for number in range(_EXPONENTS):
        edges = torch.linspace(0.1, 1, 2**number + 1)
        middles = (edges[:-1] + edges[1:]) / 2
        decade = 10.0 ** (number - _EXPONENTS + 1)
        values += (decade * middles).tolist()
        values += (-decade * middles).tolist()
    return torch.tensor(sorted(values))


@cache
def _dynamic_table() -> Tensor:
    """Return `dynamic_values`, computed once."""
    with real_values():
        return dynamic_values()


@cache
def _pairs(kind: str) -> Tensor:
    """Return the values of the two codes in each possible byte, ``float32[256, 2]``."""
    with real_values():
        table, byte = table_of(kind), torch.arange(256)
        return torch.stack([table[byte >> 4], table[byte & 15]], dim=1)


def _moved(values: Tensor, like: Tensor) -> Tensor:
    return values.to(like.device)


def _constant(values: Tensor, like: Tensor) -> Tensor:
    """Return values as a constant of the graph being traced."""
    return torch.tensor(values.tolist(), dtype=values.dtype, device=like.device)


@dataclass(frozen=True)
class Blockwise(Packing):
    """The formats NF4 and FP4.

    Attributes:
        group: the number of values in a block. Blocks span the whole weight in row-major order; the last one may be
            shorter.
        double: whether scales are stored in 8 bits.
        parts: ``codes``, ``[ceil(n / 2), 1]``, with the first of two codes in a byte's upper half; ``scales``, as bytes
            of float32 or as 8-bit codes, ``[blocks, ...]``; with ``double`` also ``nested``, the second-level scales,
            and ``offset``, which is added to the decoded scales, both as bytes of float32.
    """

    group: int = 64
    double: bool = False

    KINDS = ("nf4", "fp4")
    HAS_FORM = True

    @property
    def parts(self) -> tuple[str, ...]:  # type: ignore[override]
        return ("codes", "scales", "nested", "offset") if self.double else ("codes", "scales")

    def pack(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Return the parts of a weight, with the code of the nearest value for each entry."""
        values, order = table_of(self.kind).to(weight.device).sort()
        largest, scaled = _scaled(weight.reshape(-1).float(), self.group)
        scaled = torch.nn.functional.pad(scaled, (0, scaled.numel() % 2))
        code = order[torch.bucketize(scaled, (values[1:] + values[:-1]) / 2, out_int32=True)].to(torch.uint8)
        codes = ((code[::2] << 4) | code[1::2]).unsqueeze(1)
        if not self.double:
            return codes, as_bytes(largest.unsqueeze(1))
        offset = largest.mean()
        known = _dynamic_table().to(weight.device)
        nested, ratio = _scaled(largest - offset, SCALES)
        scales = torch.bucketize(ratio, (known[1:] + known[:-1]) / 2, out_int32=True).to(torch.uint8)
        return codes, scales.unsqueeze(1), as_bytes(nested.unsqueeze(1)), as_bytes(offset)

    def keeping(self, packed: Sequence[Tensor], parts: Sequence[Tensor], same: Tensor) -> Sequence[Tensor]:
        """Return the new parts, but the old ones for unchanged blocks.

        No block is kept with ``double``, because all scales depend on one another, or with an odd ``group``, because
        blocks then share bytes.
        """
        if self.double or self.group % 2:
            return packed
        blocks = torch.nn.functional.pad(same.reshape(-1), (0, -same.numel() % self.group), value=True)
        kept = blocks.reshape(-1, self.group).all(1)
        codes = kept.repeat_interleave(self.group // 2)[: len(packed[0])]
        each = (codes.reshape(-1, 1), kept.reshape(-1, 1))
        return [torch.where(mask, old, new) for mask, old, new in zip(each, parts, packed, strict=True)]

    def form(self, parts: Sequence[Tensor], shape: Sequence[int]) -> TableEntries:
        """Return the weight as entries of a table."""
        scales = self._scales(parts[1:], _constant)
        return TableEntries(self.kind, parts[0].reshape(-1), table_of(self.kind), scales, self.group)

    def unpack(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Look up the values of the codes in the table, and scale them."""
        codes, size = parts[0], math.prod(shape)
        pairs = torch.nn.functional.embedding(codes.reshape(-1).int(), _constant(_pairs(self.kind), codes))
        scaled = _times(pairs.reshape(-1)[:size], self._scales(parts[1:], _constant), self.group)
        return scaled.reshape(tuple(shape)).to(dtype)

    def run(self, parts: Sequence[Tensor], shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return the same values as `unpack`; on CUDA, bitsandbytes computes them if it is installed."""
        codes, size = parts[0], math.prod(shape)
        scales = self._scales(parts[1:], _moved)
        kernel = dequantize_4bit() if codes.is_cuda else None
        if kernel is not None:
            return kernel(codes, scales, self.group, self.kind, tuple(shape), dtype)
        values = pairs_by_byte(_pairs(self.kind), codes)
        if size % self.group:
            return _times(values[:size], scales, self.group).reshape(tuple(shape)).to(dtype)
        return values.view(-1, self.group).mul_(scales.unsqueeze(1)).view(tuple(shape)).to(dtype)

    def _scales(self, parts: Sequence[Tensor], table: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        if not self.double:
            return from_bytes(parts[0]).reshape(-1)
        scales = parts[0]
        nested, offset = (from_bytes(part).reshape(-1) for part in parts[1:])
        known = table(_dynamic_table(), scales)
        values = torch.nn.functional.embedding(scales.reshape(-1).int(), known.unsqueeze(1)).reshape(-1)
        return _times(values, nested, SCALES) + offset


def pairs_by_byte(table: Tensor, codes: Tensor) -> Tensor:
    """Return the two values of each byte, flattened; each pair is looked up as a single 64-bit number.

    Args:
        table: ``float32[256, 2]`` on the CPU.
        codes: ``uint8``, any shape.
    """
    both = table.view(torch.int64).reshape(-1).to(codes.device)
    return both.index_select(0, codes.reshape(-1).int()).view(torch.float32)


@cache
def dequantize_4bit() -> Callable[..., Tensor] | None:
    """Return bitsandbytes's operator; None if bitsandbytes is not installed.

    Its arguments are the codes, float32 scales, the block size, ``nf4`` or ``fp4``, and the result's shape and dtype.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return None
    importlib.import_module("bitsandbytes")
    return cast("Callable[..., Tensor]", torch.ops.bitsandbytes.dequantize_4bit.default)


def _scaled(values: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Return the largest absolute value of each block, and the block's values relative to that.

    As in bitsandbytes, values are multiplied by the reciprocal of the largest; in a shorter last block, they are
    divided by the largest.
    """
    whole = values.numel() // group * group
    blocks = values[:whole].reshape(-1, group)
    largest = blocks.abs().amax(1)
    scaled = (blocks * (1 / largest.clamp(min=1e-38)).unsqueeze(1)).reshape(-1)
    if whole < values.numel():
        last = values[whole:].abs().amax().clamp(min=1e-38)
        largest = torch.cat([largest, last.unsqueeze(0)])
        scaled = torch.cat([scaled, values[whole:] / last])
    return largest, scaled.clamp(-1, 1)


def _times(values: Tensor, scales: Tensor, group: int) -> Tensor:
    """Return the values times the scales of their blocks."""
    size = values.numel()
    missing = -size % group
    if missing:
        values = torch.nn.functional.pad(values, (0, missing))
    return (values.reshape(-1, group) * scales.unsqueeze(1)).reshape(-1)[:size]
