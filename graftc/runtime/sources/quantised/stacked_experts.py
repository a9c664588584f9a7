"""Stack the quantised weights of experts, which the files store one by one, without quantising them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.floating import Floating
from graftc.passes.core.packing.modules import Packed
from graftc.passes.core.packing.ordered import Ordered
from graftc.passes.core.packing.packing import PackedType
from graftc.passes.core.packing.row_scaled import RowScaled
from graftc.runtime.sources.quantised.folder_tensors import damaged
from graftc.runtime.sources.quantised.weights import StoredWeight, unread

_BY_ROWS = (Affine, RowScaled, Floating)
"""Packings whose parts consist of rows, so that those of experts can be stacked; `Ordered`, a subclass, is excluded."""


def stacked_experts(
    target: str,
    weights: Sequence[tuple[str | None, StoredWeight]],
    converter: Any,
    shape: tuple[int, ...],
    dtype: torch.dtype,
) -> Callable[[], Packed]:
    """Return a function that reads the experts' weights and joins them, since they form one weight in the model."""
    from transformers.core_model_loading import Concatenate, MergeModulelist

    known = len(converter.operations) in (1, 2)
    known = known and all(map(isinstance, converter.operations, (MergeModulelist, Concatenate)))
    parts = [[weight for source, weight in weights if source == pattern] for pattern in converter.source_patterns]
    if not known or len(shape) != 3:
        unread(f"{target} is made of {len(weights)} weights in a way that is not supported for quantised ones")
    if any(len(part) != shape[0] for part in parts) or shape[1] % len(parts):
        damaged(f"{target} has {shape[0]} experts, but the files have {[len(part) for part in parts]} weights")

    def read() -> Packed:
        single = shape[1] // len(parts), shape[2]
        packed = [[weight.read(single, dtype) for weight in weights] for weights in parts]
        kinds = {own for weights in packed for own, _ in weights}
        own = next(iter(kinds))
        if len(kinds) > 1 or not _joins(own, single):
            unread(f"{target} is made of weights that are quantised in ways that cannot be joined")
        packing = own.packing
        if isinstance(packing, Floating) and packing.rows == 0:
            packing = replace(packing, rows=single[0])
        stacked = [[torch.stack(part) for part in zip(*(p for _, p in weights), strict=True)] for weights in packed]
        whole = tuple(_cat(part) for part in zip(*stacked, strict=True))
        return PackedType(packing, shape, dtype), whole

    return read


def _joins(own: PackedType, single: tuple[int, int]) -> bool:
    """Return whether the parts consist of rows, and whether each weight's last block ends at its last row."""
    if not isinstance(own.packing, _BY_ROWS) or isinstance(own.packing, Ordered):
        return False
    rows = getattr(own.packing, "rows", 1)
    return not rows or single[0] % rows == 0


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat(list(parts), dim=1) if len(parts) > 1 else parts[0]
