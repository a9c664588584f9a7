"""Outputs of an exported graph in torch when its weights are rounded differently: what no comparison can tell apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.runtime.export.module import ExportModule

TIMES = 8
"""The number of roundings."""


@torch.no_grad()
def rounded_outputs(module: ExportModule, inputs: Mapping[str, Any]) -> Iterator[dict[str, Tensor]]:
    """Yield a module's outputs by name, each time with its weights rounded in another way.

    Every entry of a floating-point tensor is multiplied by ``1 + r``, with ``r`` drawn from ``[-eps / 2, eps / 2]`` of
    its dtype, by a fixed seed. The module's own tensors stay as they are; a copy of them is made each time.

    Args:
        module: the module.
        inputs: its inputs.
    """
    tensors = dict((*module.module.named_parameters(), *module.module.named_buffers()))
    for seed in range(TIMES):
        generator = torch.Generator().manual_seed(seed)
        changed = {name: _rounded(own, generator) for name, own in tensors.items() if own.is_floating_point()}
        yield torch.func.functional_call(module.module, changed, kwargs=dict(inputs))


def _rounded(own: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.rand(own.shape, generator=generator, dtype=torch.float64).sub_(0.5)
    drawn.mul_(torch.finfo(own.dtype).eps).add_(1)
    return drawn.to(own.device).mul_(own.detach()).to(own.dtype)
