"""Pack a base as recorded in a file, whether or not the base's own files are packed."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import nn

from graftc.compat.modules import parameters_of
from graftc.compiler.missing_weights import same_fresh
from graftc.compiler.quantised_sources.convert import arrived
from graftc.compiler.quantised_sources.packed_modules import plain_linear
from graftc.compiler.resolve.quantise import is_turned
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.ir.shapes import DTYPES
from graftc.passes.core.packing.modules import hold_packed
from graftc.passes.core.packing.packing import PackedType, packing_of, swapped


def packed_as(model: nn.Module, packings: Mapping[str, str]) -> nn.Module:
    """Return a model with its weights packed as recorded, or the model itself if nothing has to be packed.

    Modules that arrive quantised are converted. Weights that are dense now but were packed are packed in the same way,
    which gives the same codes if the base is the same.

    If a spec's ``base`` requested the packing, or a library quantised while loading, the checkpoint on disk is dense;
    in these cases, it is the codes that are compared.

    Args:
        model: the model, which is not changed.
        packings: packings as in `graftc.compiler.capture.identity.fingerprint.Identity.packings`; a packing that is
            invalid or does not fit is skipped.

    Raises:
        GraftError: GC162 as for `arrived`.
    """
    result = arrived(model)
    wanted = {name: own for name, text in packings.items() if (own := _fitting(result, name, text)) is not None}
    if wanted:
        result = sharing_copy(result)
        for name, own in wanted.items():
            with suppress(RuntimeError, ValueError, IndexError):  # sizes that this packing does not support
                _pack(result, name, own)
        same_fresh(model, result)
    return result


def _fitting(model: nn.Module, name: str, text: str) -> PackedType | None:
    path, _, last = name.rpartition(".")
    words, _, kind = text.partition("; ")
    try:
        module, packing, dtype = model.get_submodule(path), packing_of(words), DTYPES[kind]
    except (AttributeError, ValueError, KeyError):
        return None
    weight = parameters_of(module).get(last)
    if weight is None or weight.dtype != dtype or weight.dim() < 2:
        return None
    turned = is_turned(module) and not packing.transposed
    return PackedType(packing, swapped(weight.shape) if turned else tuple(weight.shape), dtype)


def _pack(model: nn.Module, name: str, own: PackedType) -> None:
    path, _, last = name.rpartition(".")
    module: Any = model.get_submodule(path)
    weight = module.get_parameter(last).detach()
    turned = is_turned(module) and not own.packing.transposed
    with torch.no_grad():
        parts = own.packing.packed(weight.T if turned else weight)
    if turned:
        parent, _, inner = path.rpartition(".")
        setattr(model.get_submodule(parent), inner, plain_linear(module, (own, parts)))
    else:
        hold_packed(module, {last: (own, parts)})
