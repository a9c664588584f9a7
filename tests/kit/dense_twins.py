"""Models with the dequantised values of quantised weights, as independent references for computation with codes."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from graftc.compiler.capture.signature import Axis
from graftc.compiler.preparing import Prepared, prepare
from graftc.passes.core.packing.modules import packed_types, packed_value
from graftc.specs.document import Spec


def dense_twin(model: nn.Module, axes: Sequence[Axis] | None = None, **options: Any) -> nn.Module:
    """Return a plain copy of a model with the values of its quantised weights; `axes` are the axes of its inputs."""
    twin = copy.deepcopy(model)
    modules = dict(twin.named_modules())
    count = 0
    with torch.no_grad():
        spec = Spec.model_validate({"adapt": [{"method": "full", "target": {"modules": "**"}}], "base": options})
        for path, module in prepare(Prepared(spec, model, model, axes)).model.named_modules():
            for name in packed_types(module):
                parameter = modules[path]._parameters[name]
                assert parameter is not None
                before = parameter.clone()
                parameter.copy_(packed_value(module, name))
                assert not torch.equal(parameter, before)
                count += 1
    assert count
    return twin
