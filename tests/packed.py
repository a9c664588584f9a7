"""Models whose weights have the values of quantised ones, as independent judges of what is computed with codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graftc.compiler.capture.signature import Axis
from graftc.compiler.preparing import Prepared, prepare
from graftc.passes.core.packing.modules import held_weight, packed_types
from graftc.specs.document import Spec


def dense_twin(model: nn.Module, axes: Sequence[Axis] | None = None, **options: Any) -> nn.Module:
    """A plain copy of a model, which has these inputs, with the values of its quantised weights."""
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    count = 0
    with torch.no_grad():
        spec = Spec.model_validate({"adapt": [{"method": "full", "target": {"modules": "**"}}], "base": options})
        for path, module in prepare(Prepared(spec, model, model, axes)).model.named_modules():
            for name in packed_types(module):
                held = modules[path]._parameters[name]
                assert held is not None
                before = held.clone()
                held.copy_(held_weight(module, name))
                assert not torch.equal(held, before)
                count += 1
    assert count
    return twin
