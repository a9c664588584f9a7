"""Quantised weights of a folder, and what their formats have in common."""

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
from graftc.runtime.sources.quantised.folder_tensors import FolderTensors, damaged
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown

Options: TypeAlias = Mapping[str, Any]
"""What a config says under ``quantization_config``."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredWeight:
    """One quantised weight of a folder.

    Attributes:
        name: the name that it would have if it were not quantised.
        read: a function that reads it, for the sizes and the element type that the model wants.
    """

    name: str
    read: Callable[[tuple[int, ...], torch.dtype], Packed]


Format: TypeAlias = Callable[[FolderTensors, Options], Iterable[StoredWeight]]
"""Finds the quantised weights of a folder."""


def unread(message: str, hint: str | None = None) -> NoReturn:
    """Raise GC161 for a format, or an option of one, that is not read."""
    hint = hint or "take the checkpoint that is not quantised, and let the spec quantise it: base: {quantize: nf4}"
    raise GraftError("GC161", message, hint=hint)


def whole_number(options: Options, name: str, default: int | None = None) -> int:
    """Return a whole number from a config; raise GC161 if it is anything else."""
    value = options.get(name, default)
    if type(value) is not int:
        unread(f"the quantization_config has {name}: {shown(value)}, which is not a whole number")
    return value


def affine(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, order: Tensor | None, dtype: torch.dtype
) -> Packed:
    """Pack a weight of whole numbers.

    Args:
        codes: ``uint8[rows, in]``, counted from 0.
        scales, zeros: ``[rows, groups]``; zeros have the form of codes.
        bits: the number of bits of a code; codes of fewer than 4 are stored in 4, those of 5 to 7 in 8.
        group: the number of inputs in a group.
        order: the group of each input, if groups are not consecutive.
        dtype: the element type of the weight; values are computed in that of ``scales``.
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
    """Return the group of each input as stored; None if groups consist of consecutive inputs.

    Raises:
        GraftError: GC163 for groups that do not exist.
    """
    if bool((groups < 0).any()) or bool((groups >= count).any()):
        damaged(f"{name} has inputs in group {int(groups.max())}; there are {count} groups")
    return None if torch.equal(groups.long(), torch.arange(groups.numel()) // group) else groups
