"""Give a model its own tensors for a pass that may write to them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor, nn

from graftc.compat.modules import buffers_of, parameters_of


def with_own_tensors(model: nn.Module, written: Collection[str], aliases: Mapping[str, str]) -> dict[str, Tensor]:
    """Replace a model's tensors with others that a pass may write to, and return the copies by name.

    Buffers, tensors in attributes and parameters in ``written`` are copied. Other parameters are replaced with ones
    that do not require a gradient, since this affects the choice of kernels. The caller restores the tables.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    own_copy = {id(parameter) for name, parameter in named if aliases.get(name, name) in written}
    copies: dict[int, Tensor] = {}

    def copied(tensor: Tensor) -> Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        return copies[id(tensor)]

    def frozen(parameter: Any) -> Any:
        writes = id(parameter) in own_copy
        if type(parameter) is not nn.Parameter or not (parameter.requires_grad or writes):
            return parameter
        if id(parameter) not in copies:
            data = parameter.detach().clone() if writes else parameter.detach()
            copies[id(parameter)] = nn.Parameter(data, requires_grad=False)
        return copies[id(parameter)]

    for module in model.modules():
        own = vars(module)
        parameters, buffers = parameters_of(module), buffers_of(module)
        parameters.update({name: frozen(parameter) for name, parameter in parameters.items()})
        buffers.update({name: copied(buffer) for name, buffer in buffers.items() if buffer is not None})
        own.update({name: copied(value) for name, value in own.items() if type(value) is Tensor})
    owned = [(n, t) for n, t in model.named_parameters(remove_duplicate=False) if aliases.get(n, n) in written]
    return dict([*owned, *model.named_buffers(remove_duplicate=False)])
