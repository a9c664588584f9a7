"""Find the places of a folder's quantised weights in a model that has no weights yet."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from graftc.compat.modules import parameters_of
from graftc.compat.transformers import leave_as_it_is
from graftc.compiler.resolve.quantise import is_turned
from graftc.passes.core.grouping import grouped_pairs
from graftc.passes.core.packing.modules import Packed
from graftc.runtime.sources.folder_checks import converted_names
from graftc.runtime.sources.quantised.folder_tensors import damaged
from graftc.runtime.sources.quantised.stacked_experts import stacked_experts
from graftc.runtime.sources.quantised.weights import StoredWeight


@dataclass(frozen=True)
class PackedPlace:
    """A parameter to be packed.

    Attributes:
        module: the module that has it.
        parameter: its name in the module.
        read: a function that reads its codes.
    """

    module: nn.Module
    parameter: str
    read: Callable[[], Packed]


def places_of(model: Any, stored: Iterable[StoredWeight]) -> list[PackedPlace]:
    """Return the parameters for quantised weights, and remove them from the model.

    Loading then does not report them as missing. Modules with transposed weights become plain linear maps.

    Args:
        model: a transformers model, on the meta device.
        stored: the weights.

    Raises:
        GraftError: GC163 if the model has no place for a weight, GC161 if several weights that form one parameter
            cannot be joined without quantising again.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, dot_natural_key

    converters = [e for e in get_model_conversion_mapping(model, None, None) if isinstance(e, WeightConverter)]
    ordered, known = sorted(stored, key=lambda weight: dot_natural_key(weight.name)), model.state_dict()
    names = converted_names(model, [weight.name for weight in ordered], known)
    for weight in ordered:
        if names[weight.name][0] not in known:
            damaged(f"{type(model).__name__} has no place for {weight.name}")
    targets = ((weight, *names[weight.name]) for weight in ordered)
    places = []
    for target, weights in grouped_pairs((target, (source, weight)) for weight, target, source in targets).items():
        path, _, name = target.rpartition(".")
        module = model.get_submodule(path)
        if weights[0][0] is None and name == "weight":
            module = _as_linear(model, path, module)
        parameter = parameters_of(module).get(name)
        if parameter is None:
            damaged(f"{target} of {type(model).__name__} is not a parameter")
        shape, dtype = tuple(parameter.shape), parameter.dtype
        if weights[0][0] is None:
            read: Callable[[], Packed] = partial(weights[0][1].read, shape, dtype)
        else:
            sources = {source: converter for converter in converters for source in converter.source_patterns}
            read = stacked_experts(target, weights, sources[str(weights[0][0])], shape, dtype)
        parameters_of(module)[name] = None
        module.__dict__[name] = parameter.detach()  # on meta, for code that initialises all of a module's tensors
        leave_as_it_is(module)
        places.append(PackedPlace(module, name, read))
    return places


def _as_linear(model: nn.Module, path: str, module: nn.Module) -> nn.Module:
    """Return a linear map ``[out, in]``: the module itself, or its replacement in the model if it is ``[in, out]``."""
    if not is_turned(module):
        return module
    weight = parameters_of(module)["weight"]
    assert weight is not None
    linear = nn.Linear(weight.shape[0], weight.shape[1], dtype=weight.dtype, device="meta")
    linear.train(module.training)
    parent, _, name = path.rpartition(".")
    setattr(model.get_submodule(parent), name, linear)
    return linear
