"""Refuse to wrap a compiled model in a peft model; the error's hint names the graftc calls to use instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from graftc.passes.core.weights.containers import Tree
from graftc.specs.errors.diagnostics import GraftError

_HINT = (
    "graftc.compile(config, model) accepts PEFT's config and the source model; compiled.add({...}) adds an adaptation; "
    "graftc.import_peft(folder, model) reads a folder that PEFT saved; pass trainers the compiled model, no peft_config"
)


def refuse_wrapping() -> None:
    """Register a hook that raises when a compiled model becomes part of a peft model.

    peft calls no hook on a model before changing it. However, `get_peft_model`, `inject_adapter_in_model`,
    `PeftModel.from_pretrained` and trainers with a ``peft_config`` all register the model in a peft module first.
    """
    register_module_module_registration_hook(_check)


def _check(module: nn.Module, name: str, part: Any) -> None:
    """Raise if a peft module registers a compiled model.

    The signature is the one that `torch.nn.modules.module.register_module_module_registration_hook` expects of a hook.

    Raises:
        GraftError: GC072.
    """
    if isinstance(part, Tree) and any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
        message = f"PEFT's {type(module).__name__} cannot adapt a {type(part).__name__}, whose graphs are adapted"
        raise GraftError("GC072", message, hint=_HINT)
