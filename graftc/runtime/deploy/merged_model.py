"""A merged model as a source model, which something else can be compiled on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from graftc.compiler.resolve.untie import sharing_copy
from graftc.runtime.model.runner import runner_of

if TYPE_CHECKING:
    from graftc.runtime.deploy.merged import Merged, MergedRunner


def base_of(merged: Merged | MergedRunner) -> Any:
    """A model with the folded weights: of the source's own class as `Merged.to_transformers` gives it, and where
    weights are packed a copy of the source that holds what is packed.

    Raises:
        GraftError: GC052 when the class has no place for a folded tensor, GC032 for a source without a config.
    """
    runner = runner_of(merged)
    if not runner._store.packed:
        return runner.to_transformers()
    made: nn.Module = sharing_copy(runner._compilation.model)
    tensors = runner.folded_state_dict()
    for path, module in made.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(tensors[f"{path}.{name}".lstrip(".")], requires_grad=False)
    return made
