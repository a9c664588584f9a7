"""Modules with packed weights, which store the parts and compute a weight from them whenever it is read."""

from __future__ import annotations

import types
from collections.abc import Mapping
from functools import cache, partial
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn

from graftc.compat.modules import parameters_of
from graftc.passes.core.packing.packed_tensor import PackedTensor
from graftc.passes.core.packing.packing import PackedType, Packing

Packed: TypeAlias = tuple[PackedType, tuple[Tensor, ...]]
"""A packed weight: its type, and its parts."""

_TYPES = "_graftc_packed"
"""Class attribute of these modules that contains the types of their packed weights, by name."""


def packed_types(module: nn.Module | type) -> Mapping[str, PackedType]:
    """Return the types of the packed weights that a module itself owns, by name; empty for most modules."""
    return cast("Mapping[str, PackedType]", getattr(module, _TYPES, types.MappingProxyType({})))


def packed_value(module: nn.Module, name: str) -> Tensor:
    """Compute the value of one of a module's packed weights."""
    own = packed_types(module)[name]
    return own.value([_part(module, part) for part in own.names(name)])


def _part(module: nn.Module, name: str) -> Tensor:
    parameter = parameters_of(module)[name]
    assert parameter is not None
    return parameter


def hold_packed(module: nn.Module, packed: Mapping[str, Packed]) -> None:
    """Make a module store parts instead of weights; the code of its class still reads the weights as before.

    Args:
        module: the module to change.
        packed: types and parts, by parameter name. Parts that are already parameters are stored as they are, so that
            several modules can share them.
    """
    parameters = dict(parameters_of(module))
    parameters_of(module).clear()
    for name, parameter in parameters.items():
        if name not in packed:
            parameters_of(module)[name] = parameter
            continue
        own, parts = packed[name]
        for part, value in zip(own.names(name), parts, strict=True):
            own_part = value if isinstance(value, nn.Parameter) else nn.Parameter(value, requires_grad=False)
            parameters_of(module)[part] = own_part
    all_types = {**packed_types(module), **{name: own for name, (own, _) in packed.items()}}
    cls: Any = type(module)
    module.__class__ = _class_of(cls, tuple(all_types.items()))


def hold_values(module: nn.Module, dtype: torch.dtype | None = None, *, empty: bool = False) -> None:
    """Undo `hold_packed`: make a module store the values of its packed weights as frozen parameters.

    Args:
        module: the module to change.
        dtype: the dtype of the values, which must be able to represent all of them; by default each weight's own.
        empty: whether to leave the values out: the parameters are on the meta device, until others replace them.
    """
    packed = packed_types(module)
    if not packed:
        return
    first = {own.names(name)[0]: name for name, own in packed.items()}
    parts = {part for name, own in packed.items() for part in own.names(name)}
    parameters = dict(parameters_of(module))
    values = {
        name: torch.empty(own.shape, dtype=own.dtype, device="meta") if empty else packed_value(module, name)
        for name, own in packed.items()
    }
    parameters_of(module).clear()
    for name, parameter in parameters.items():
        if name in first:
            weight = first[name]
            value = values[weight] if dtype is None else values[weight].to(dtype)
            parameters_of(module)[weight] = nn.Parameter(value, requires_grad=False)
        elif name not in parts:
            parameters_of(module)[name] = parameter
    cls: Any = type(module)
    module.__class__ = _source_of(cls)


def _source_of(cls: Any) -> Any:
    while packed_types(cls):
        cls = cls.__mro__[1]
    return cls


@cache
def _class_of(cls: Any, packed: tuple[tuple[str, PackedType], ...]) -> type[nn.Module]:
    cls = _source_of(cls)
    space: dict[str, Any] = {_TYPES: dict(packed), "__module__": cls.__module__, "__doc__": cls.__doc__}
    for name, _ in packed:
        space[name] = property(partial(_value, name))
    return types.new_class(cls.__name__, (cls,), {}, lambda own: own.update(space))


def _value(name: str, module: nn.Module) -> Tensor:
    return packed_value(module, name)


def packed_weights(model: nn.Module) -> dict[str, PackedTensor]:
    """Return a model's packed weights by name; tied weights are listed under each of their names."""
    return {
        f"{path}.{name}".lstrip("."): PackedTensor(own, [_part(module, part) for part in own.names(name)])
        for path, module in model.named_modules(remove_duplicate=False)
        for name, own in packed_types(module).items()
    }


def packed_parameter(weight: Tensor, packing: Packing) -> Packed:
    """Return the type and the parts that a module stores instead of a weight; see `hold_packed`."""
    with torch.no_grad():
        parts = tuple(nn.Parameter(part, requires_grad=False) for part in packing.packed(weight))
    return PackedType(packing, tuple(weight.shape), weight.dtype), parts
