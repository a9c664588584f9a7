"""A folder's quantised weights, and helpers that their formats share."""

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
"""The ``quantization_config`` of a config."""

FLOATS = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class StoredWeight:
    """One quantised weight in a folder.

    Attributes:
        name: the name that it would have if it were not quantised.
        read: a function that reads it, given the shape and the dtype that the model requires.
    """

    name: str
    read: Callable[[tuple[int, ...], torch.dtype], Packed]


Format: TypeAlias = Callable[[FolderTensors, Options], Iterable[StoredWeight]]
"""A function that finds the quantised weights in a folder."""


def unread(message: str, hint: str | None = None) -> NoReturn:
    """Raise GC161 for a format, or an option of a format, that is not supported."""
    hint = hint or "use the checkpoint that is not quantised, and let the spec quantise it: base: {quantize: nf4}"
    raise GraftError("GC161", message, hint=hint)


def whole_number(options: Options, name: str, default: int | None = None) -> int:
    """Return an integer from a config; raise GC161 if it is anything else."""
    value = options.get(name, default)
    if type(value) is not int:
        unread(f"the quantization_config has {name}: {shown(value)}, which is not an integer")
    return value


def affine(
    codes: Tensor, scales: Tensor, zeros: Tensor, bits: int, group: int, order: Tensor | None, dtype: torch.dtype
) -> Packed:
    """Pack a weight stored as integers.

    Args:
        codes: ``uint8[rows, in]``, starting at 0.
        scales, zeros: ``[rows, groups]``; zeros have the same form as codes.
        bits: the number of bits per code; codes of fewer than 4 bits are stored in 4, codes of 5 to 7 bits in 8.
        group: the number of inputs per group.
        order: the group of each input, if groups are not consecutive.
        dtype: the weight's dtype; values are computed in the dtype of ``scales``.
    """
    rows, width = codes.shape
    group = 0 if group >= width else group
    bytewise = bits > 4
    stored = [codes ^ 128 if bytewise else halves(codes), as_bytes(scales), zeros ^ 128 if bytewise else zeros]
    via = via_of(scales.dtype)
    if order is not None:
        packing: Affine = Ordered("int8_ordered" if bytewise else "int4_ordered", group, via=via)
        stored.append(as_bytes(order.to(torch.int32).unsqueeze(0)))
    elif bytewise and not bool(stored[2].any()):
        packing = Affine("int8", group, via=via)
        stored.pop()
    else:
        packing = Affine("int8z" if bytewise else "int4", group, via=via)
    return PackedType(packing, (rows, width), dtype), tuple(part.contiguous() for part in stored)


def order_of(groups: Tensor, name: str, group: int, count: int) -> Tensor | None:
    """Return each input's group as stored; None if groups consist of consecutive inputs.

    Raises:
        GraftError: GC163 for groups that do not exist.
    """
    if bool((groups < 0).any()) or bool((groups >= count).any()):
        damaged(f"{name} has inputs in group {int(groups.max())}, but there are {count} groups")
    return None if torch.equal(groups.long(), torch.arange(groups.numel()) // group) else groups
