"""Quantise a source model's weights, as a spec's ``base`` requests.

The model's graph shows which weights belong to linear maps and experts, and how they are stored.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from graftc.compat.modules import parameters_of
from graftc.compiler.capture.capture import Capture
from graftc.compiler.resolve.untie import sharing_copy
from graftc.compiler.roles.findings import place
from graftc.compiler.roles.structure import find_structure
from graftc.passes.core.packing.affine import Affine
from graftc.passes.core.packing.blockwise import Blockwise
from graftc.passes.core.packing.modules import Packed, hold_packed, packed_parameter, packed_types
from graftc.passes.core.packing.packing import Packing
from graftc.passes.core.sites.readers import linear_use
from graftc.passes.core.weights.weight_slice import Layout
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.options.base import BaseOptions
from graftc.specs.patterns import match_modules

_PACKABLE = (torch.float32, torch.float16, torch.bfloat16)

_GROUPS = {"int8": 0, "int4": 64, "nf4": 64, "fp4": 64}
"""Default group size of each format; 0 means a whole row."""


def packing_for(options: BaseOptions, *, transposed: bool = False) -> Packing:
    """Return the packing that a spec's options request.

    Args:
        options: the options, with a format.
        transposed: whether the weight is ``[in, out]``.
    """
    kind = str(options.quantize)
    group = _GROUPS[kind] if options.group is None else options.group
    if kind in Blockwise.KINDS:
        return Blockwise(kind, group=group, double=options.double, transposed=transposed)
    return Affine(kind, group=group, transposed=transposed)


def linear_maps(capture: Capture) -> dict[str, Layout]:
    """Return the layouts, by name, of the weights that are read only by linear maps and experts.

    Only weights in repeated layers count, unless the model has no repeated layers. Routers, whose results decide what
    is computed, are left out.
    """
    graph = capture.program.graph
    routers = {f.node for f in find_structure(graph, capture.constants).findings if f.role.endswith("router")}
    layouts: dict[str, list[Layout | None]] = {}
    for node in graph.nodes:
        use = linear_use(node)
        if use is not None:
            apart = node in routers or use.input_axis is None or use.grouped
            layouts.setdefault(use.weight.tensor, []).append(None if apart else use.weight.layout)
    matrices: dict[str, list[Layout]] = {
        name: [layout for layout in read_as if layout in (Layout.ROWS, Layout.COLUMNS)]
        for name, read_as in layouts.items()
    }
    known = {name: own[0] for name, own in matrices.items() if len(own) == len(layouts[name])}
    inside = {name: layout for name, layout in known.items() if place(name)[0] is not None}
    return inside if any(place(name)[0] is not None for name in layouts) else known


def quantised(model: nn.Module, options: BaseOptions, maps: Mapping[str, Layout]) -> nn.Module:
    """Return a copy of ``model`` with packed weights; everything else is shared.

    Weights that are already packed stay unchanged. The model is not changed.

    Args:
        model: the source.
        options: the format, and the modules to leave out.
        maps: the weights, as returned by `linear_maps`.

    Raises:
        GraftError: GC011 for a pattern in ``skip`` that matches no module, GC160 if nothing can be quantised.
    """
    result: nn.Module = sharing_copy(model)
    modules = dict(result.named_modules())
    skipped = match_modules(options.skip, [path for path in modules if path], "base.skip")
    chosen: dict[str, dict[str, Packing]] = {}
    others = False
    for name, layout in maps.items():
        path, _, last = name.rpartition(".")
        if any(path == out or path.startswith(f"{out}.") for out in skipped):
            continue
        weight = parameters_of(modules[path]).get(last)
        others |= weight is not None and weight.dtype not in _PACKABLE
        if weight is not None and weight.dtype in _PACKABLE:
            chosen.setdefault(path, {})[last] = packing_for(options, transposed=layout is Layout.COLUMNS)
    _pack(result, chosen)
    if not any(packed_types(module) for module in result.modules()):
        hint = "skip fewer modules" if skipped else "leave quantize out"
        message = f"{type(model).__name__} has no linear maps in repeated layers that could be quantised"
        message += " (only float32, bfloat16 and float16 can)" if others else ""
        raise GraftError("GC160", message, place=Place(path="base.quantize"), hint=hint)
    return result


def _pack(model: nn.Module, chosen: Mapping[str, Mapping[str, Packing]]) -> None:
    """Pack some of a model's weights; a tensor that several modules share stays shared."""
    modules = dict(model.named_modules(remove_duplicate=False))
    wanted = {
        id(parameters_of(modules[path])[name]): own for path, part in chosen.items() for name, own in part.items()
    }
    parts: dict[int, Packed] = {}
    for module in dict.fromkeys(modules.values()):
        tensors = {n: p for n, p in parameters_of(module).items() if p is not None and id(p) in wanted}
        for parameter in tensors.values():
            if id(parameter) not in parts:
                parts[id(parameter)] = packed_parameter(parameter, wanted[id(parameter)])
        if tensors:
            hold_packed(module, {name: parts[id(parameter)] for name, parameter in tensors.items()})


def is_turned(module: nn.Module) -> bool:
    """Return whether a module is a linear map whose weight is ``[in, out]``, such as transformers' ``Conv1D``."""
    weight, outputs = parameters_of(module).get("weight"), getattr(module, "nf", None)
    return weight is not None and weight.dim() == 2 and type(outputs) is int and weight.shape[1] == outputs
