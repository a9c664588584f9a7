"""A source model with its base quantised, as a spec's ``base`` asks for."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from graftc.compiler.resolve.select import match_modules
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.blockwise import Blockwise
from graftc.passes.core.packing.modules import pack_weights, packed_types
from graftc.passes.core.packing.packing import Packing
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.options.base import BaseOptions

_LEAST = {"int8": 0, "int4": 64, "nf4": 64, "fp4": 64}
"""Groups by format, where the spec has none; 0 is a whole row."""


def packing_for(options: BaseOptions, *, transposed: bool = False) -> Packing:
    """The packing that a spec's options name.

    Args:
        options: with a format.
        transposed: the weight is ``[in, out]``.
    """
    kind = str(options.quantize)
    group = _LEAST[kind] if options.group is None else options.group
    if kind in Blockwise.KINDS:
        return Blockwise(kind, group=group, double=options.double, transposed=transposed)
    return Affine(kind, group=group, transposed=transposed)


def quantised(model: nn.Module, options: BaseOptions) -> nn.Module:
    """A copy of ``model`` whose linear maps and experts in repeated layers have packed weights; all else is shared.
    What is packed already stays as it is. The model is not changed.

    Args:
        model: the source.
        options: the format, and what is left out.

    Raises:
        GraftError: GC011 for a pattern of ``skip`` that matches no module, GC160 where nothing can be quantised.
    """
    result: nn.Module = sharing_copy(model)
    paths = [path for path, _ in result.named_modules() if path]
    skipped = set(match_modules(options.skip, paths)) if options.skip else set()
    held = any(packed_types(module) for module in result.modules())
    for path, module in _in_layers(result):
        if any(path == name or path.startswith(f"{name}.") for name in skipped):
            continue
        found = {name: packing_for(options, transposed=turned) for name, turned in _maps(module)}
        if found:
            held = True
            pack_weights(module, found)
    if not held:
        hint = "leave quantize out" if not skipped else "skip fewer modules"
        message = f"{type(model).__name__} has no linear maps in repeated layers that could be quantised"
        raise GraftError("GC160", message, place=Place(path="base.quantize"), hint=hint)
    return result


def _in_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules in the layers of lists; all modules of a model without any."""
    lists = [path for path, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1]
    for path, module in model.named_modules():
        if not lists or any(path.startswith(f"{name}.") for name in lists):
            yield path, module


def _maps(module: nn.Module) -> Iterator[tuple[str, bool]]:
    """The weights of a module that its linear maps multiply by, and whether they are stored ``[in, out]``."""
    weight = module._parameters.get("weight")
    if isinstance(module, nn.Linear) and _is_packable(weight):
        yield "weight", False
    elif type(module).__name__ == "Conv1D" and weight is not None and weight.dim() == 2 and _is_packable(weight):
        yield "weight", True
    experts = getattr(module, "num_experts", None)
    for name, parameter in module._parameters.items():
        if parameter is not None and parameter.dim() == 3 and parameter.shape[0] == experts and _is_packable(parameter):
            yield name, bool(getattr(module, "is_transposed", False))


def _is_packable(weight: Any) -> bool:
    return isinstance(weight, nn.Parameter) and weight.dtype in (torch.float32, torch.float16, torch.bfloat16)
