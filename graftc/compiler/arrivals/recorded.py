"""A base as a file recorded it: packed where it was packed, whether its own files are or not."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.arrivals.arrived import arrived
from graftc.compiler.arrivals.modules import plain_linear
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.resolve.quantise import is_turned
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.ir.shapes import DTYPES
from graftc.passes.core.packing.modules import hold_packed
from graftc.passes.core.packing.packing import PackedType, packing_of, swapped


def packed_as(model: nn.Module, packings: Mapping[str, str]) -> nn.Module:
    """A model as it was when it was recorded: what arrives quantised is taken over, and what is dense here and was
    packed is packed in the same way, which gives the same codes where the base is the same. The model itself where
    neither is so.

    A spec's ``base`` and libraries that quantise while loading leave a dense checkpoint on the disk; what is compared
    then are the codes.

    Args:
        model: is not changed.
        packings: as `graftc.compiler.capture.identity.fingerprint.Identity.packings` has them; one that is none, or
            that does not fit, is passed over.

    Raises:
        GraftError: GC162 as `arrived`.
    """
    made = arrived(model)
    found = {name: own for name, text in packings.items() if (own := _fitting(made, name, text)) is not None}
    if found:
        made = sharing_copy(made)
        for name, own in found.items():
            with suppress(RuntimeError, ValueError, IndexError):  # sizes that such a packing does not have
                _pack(made, name, own)
        same_fresh(model, made)
    return made


def _fitting(model: nn.Module, name: str, text: str) -> PackedType | None:
    path, _, last = name.rpartition(".")
    words, _, kind = text.partition("; ")
    try:
        module, packing, dtype = model.get_submodule(path), packing_of(words), DTYPES[kind]
    except (AttributeError, ValueError, KeyError):
        return None
    weight = module._parameters.get(last)
    if weight is None or weight.dtype != dtype or weight.dim() < 2:
        return None
    turned = is_turned(module) and not packing.transposed
    return PackedType(packing, swapped(weight.shape) if turned else tuple(weight.shape), dtype)


def _pack(model: nn.Module, name: str, own: PackedType) -> None:
    path, _, last = name.rpartition(".")
    module: Any = model.get_submodule(path)
    weight: Tensor = module._parameters[last].detach()
    turned = is_turned(module) and not own.packing.transposed
    with torch.no_grad():
        parts = own.packing.packed(weight.T if turned else weight)
    if turned:
        parent, _, inner = path.rpartition(".")
        setattr(model.get_submodule(parent), inner, plain_linear(module, (own, parts)))
    else:
        hold_packed(module, {last: (own, parts)})
