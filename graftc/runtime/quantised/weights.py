"""A quantised weight of a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, TypeAlias

import torch
from torch import Tensor

from graftc.passes.core.packing.affine import Affine, halves
from graftc.passes.core.packing.modules import Packed
from graftc.passes.core.packing.ordered import Ordered
from graftc.passes.core.packing.packing import PackedType, as_bytes, via_of
from graftc.runtime.quantised.tensors import FolderTensors, damaged
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown

Options: TypeAlias = Mapping[str, Any]
"""What a config says under ``quantization_config``."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredWeight:
    """One weight.

    Attributes:
        name: what it would be called if it were not quantised.
        read: reads it; of the sizes and the element type that the model wants.
    """

    name: str
    read: Callable[[tuple[int, ...], torch.dtype], Packed]


Format: TypeAlias = Callable[[FolderTensors, Options], Iterable[StoredWeight]]
"""Finds the quantised weights of a folder."""


def unread(message: str, hint: str | None = None) -> NoReturn:
    """Refuse a format or an option of one: GC161."""
    hint = hint or "take the checkpoint that is not quantised, and let the spec quantise it: base: {quantize: nf4}"
    raise GraftError("GC161", message, hint=hint)


def whole_number(options: Options, name: str, default: int | None = None) -> int:
    """A number of a config. GC161 where it is not a number."""
    found = options.get(name, default)
    if type(found) is not int:
        unread(f"the quantization_config has {name}: {shown(found)}, which is not a whole number")
    return found


def affine(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, order: Tensor | None, dtype: torch.dtype
) -> Packed:
    """A weight of whole numbers.

    Args:
        codes: ``uint8[rows, in]`` from 0.
        scales, zeros: ``[rows, groups]``; zeros as codes are.
        bits: of a code; those of fewer than 4 are stored in 4, of 5 to 7 in 8.
        group: inputs in a group.
        order: the group of each input, where they are not consecutive.
        dtype: the element type of the weight; values are made in that of ``scales``.
    """
    rows, width = codes.shape
    group = 0 if group >= width else group
    middle = 128
    stored = [as_bytes(scales)]
    if bits > 4:
        codes, signed = codes ^ middle, zeros ^ middle
        stored = [codes, *stored, signed]
    else:
        stored = [halves(codes), *stored, zeros]
    via = via_of(scales.dtype)
    if order is not None:
        kind = "int8_ordered" if bits > 4 else "int4_ordered"
        packing: Affine = Ordered(kind, group, via=via)
        stored.append(as_bytes(order.to(torch.int32).unsqueeze(0)))
    elif bits > 4 and not bool(stored[2].any()):
        packing = Affine("int8", group, via=via)
        stored.pop()
    else:
        packing = Affine("int8z" if bits > 4 else "int4", group, via=via)
    return PackedType(packing, (rows, width), dtype), tuple(part.contiguous() for part in stored)


def order_of(groups: Tensor, name: str, group: int, count: int) -> Tensor | None:
    """The group of each input as it is stored; None where groups are of consecutive inputs.

    Raises:
        GraftError: GC163 for groups that there are not.
    """
    if bool((groups < 0).any()) or bool((groups >= count).any()):
        damaged(f"{name} has inputs in group {int(groups.max())}; there are {count} groups")
    return None if torch.equal(groups.long(), torch.arange(groups.numel()) // group) else groups
