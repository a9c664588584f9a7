"""Turn a merged model into a source model on which another one can be compiled."""

from __future__ import annotations

from typing import Any

from torch import nn

from graftc.compat.modules import parameters_of
from graftc.compiler.resolve.untie import sharing_copy
from graftc.runtime.deploy.folded_runner import FoldedRunner
from graftc.runtime.interop.transformers import to_transformers
from graftc.runtime.model.runner import ModelRoot, runner_of


def base_of(merged: ModelRoot | FoldedRunner) -> Any:
    """Return a plain model with the folded weights.

    It is an instance of the source's class, as returned by `Merged.to_transformers`; if weights are packed, it is a
    copy of the source that contains the packed parts.

    Raises:
        GraftError: GC052 if the class cannot hold a folded tensor or builds a model that computes something else, as
            it was changed after loading; GC032 for a source without a config.
    """
    runner: FoldedRunner = runner_of(merged)
    if not runner.store.packed:
        return to_transformers(runner)
    model: nn.Module = sharing_copy(runner.compilation.model)
    tensors = runner.folded_state_dict()
    for path, module in model.named_modules():
        for name, parameter in parameters_of(module).items():
            if parameter is not None:
                parameters_of(module)[name] = nn.Parameter(tensors[f"{path}.{name}".lstrip(".")], requires_grad=False)
    return model
