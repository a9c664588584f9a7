"""Make a deeper model from ranges of a model's layers, which share its tensors."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import nn

from graftc.compat.modules import buffers_of, parameters_of
from graftc.compiler.resolve.untie import sharing_copy
from graftc.passes.core.ir.layers import layer_path
from graftc.specs.errors.diagnostics import GraftError, Place

_PLACE = Place(path="layer_replication")
_MOST = 1024
"""The most layers of a deeper model."""
_BY_LAYER = ("layer_types", "mlp_layer_types")
"""Fields of transformers' configs that have an item for each layer."""


def replicated(model: nn.Module, ranges: Sequence[Sequence[int]]) -> nn.Module:
    """Return a model whose layers are those of ``ranges``, one range after the other.

    Layers that occur several times share their parameters and buffers. The number of layers in a transformers config
    changes accordingly, so that caches have the right length.

    Args:
        model: the source, which is not changed; it has one stack of layers.
        ranges: the first layer of each range, and the layer behind its last.

    Raises:
        GraftError: GC002 for a range that is empty or exceeds the stack, GC009 for too many layers, GC034 if the model
            does not have exactly one stack of layers.
    """
    stack = _stack_of(model)
    count = len(list(model.get_submodule(stack).children()))
    for index, (first, end) in enumerate(ranges):
        if not 0 <= first < end <= count:
            message = f"[{first}, {end}] is not a range of the {count} layers of {stack}"
            place = Place(path=f"layer_replication[{index}]")
            raise GraftError("GC002", message, place=place, hint=f"for example [0, {count}]")
    order = [number for first, end in ranges for number in range(first, end)]
    if len(order) > _MOST:
        message = f"the ranges have {len(order):,} layers, and a model may have at most {_MOST:,}"
        raise GraftError("GC009", message, place=_PLACE, hint="use fewer ranges")
    result: nn.Module = sharing_copy(model)
    before: Any = result.get_submodule(stack)
    layers = list(before.children())
    used: set[int] = set()
    copies: list[nn.Module] = []
    for depth, number in enumerate(order):
        layer: Any = _another(layers[number]) if number in used else layers[number]
        used.add(number)
        copies.append(layer)
        for module in layer.modules():
            if isinstance(getattr(module, "layer_idx", None), int):
                module.layer_idx = depth
    path, _, name = stack.rpartition(".")
    setattr(result.get_submodule(path), name, type(before)(copies))
    for config in _configs(result):
        _adjust(config, order, count)
    return result


def _stack_of(model: nn.Module) -> str:
    """Return the path of the model's only stack of layers."""
    stacks: dict[str, None] = dict.fromkeys(
        path.rpartition(".")[0] for path, _ in model.named_modules() if path and layer_path(path) == path
    )
    lists = [path for path in stacks if isinstance(model.get_submodule(path), nn.ModuleList)]
    if len(lists) != 1:
        counted = f"{len(lists)} stacks of layers: {', '.join(lists)}" if lists else "no stack of layers"
        message = f"{type(model).__name__} has {counted}; layers can be replicated in a model with exactly one"
        raise GraftError("GC034", message, place=_PLACE, hint="leave layer_replication out")
    return lists[0]


def _another(layer: nn.Module) -> nn.Module:
    """Return a copy of a layer with the same parameters and buffers."""
    tensors = chain.from_iterable((*parameters_of(m).values(), *buffers_of(m).values()) for m in layer.modules())
    return copy.deepcopy(layer, {id(tensor): tensor for tensor in tensors if tensor is not None})


def _configs(model: nn.Module) -> list[Any]:
    """Return the configs that the model's modules read, each once."""
    configs = {id(own): own for module in model.modules() if (own := getattr(module, "config", None)) is not None}
    return list(configs.values())


def _adjust(config: Any, order: Sequence[int], before: int) -> None:
    """Change what a config says about a number of layers that equals the old one."""
    for name in _BY_LAYER:
        items = getattr(config, name, None)
        if isinstance(items, list) and len(items) == before:
            setattr(config, name, [items[number] for number in order])
    if getattr(config, "num_hidden_layers", None) == before:
        config.num_hidden_layers = len(order)
