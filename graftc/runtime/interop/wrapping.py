"""A check that raises when a compiled model is put into a model of peft, with a hint of what to write instead."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from graftc.passes.core.weights.containers import Tree
from graftc.specs.errors.diagnostics import GraftError

_HINT = (
    "graftc.compile(config, model) takes PEFT's config and the source model; compiled.add({...}) adds an adaptation; "
    "graftc.import_peft(folder, model) reads what PEFT has saved; a trainer takes the compiled model and no peft_config"
)


def refuse_wrapping() -> None:
    """Register a hook that raises when a compiled model becomes part of a model of peft.

    peft calls no hook of a model before it changes it, but `get_peft_model`, `inject_adapter_in_model`,
    `PeftModel.from_pretrained` and trainers with a ``peft_config`` all register it in a module of peft first.
    """
    register_module_module_registration_hook(_check)


def _check(module: nn.Module, name: str, part: Any) -> None:
    """Raise if a module of peft registers a compiled model.

    The signature is that of the hooks of `torch.nn.modules.module.register_module_module_registration_hook`.

    Raises:
        GraftError: GC072.
    """
    if isinstance(part, Tree) and any(cls.__module__.partition(".")[0] == "peft" for cls in type(module).__mro__):
        message = f"{type(module).__name__} of PEFT cannot adapt a {type(part).__name__}, whose graphs are adapted"
        raise GraftError("GC072", message, hint=_HINT)
