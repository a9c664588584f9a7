"""Attributes and methods that other libraries expect of a model, copied from the source or replaced."""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable
from typing import Any, NoReturn

from torch import nn

from graftc.compat.modules import children_of
from graftc.passes.core.weights.containers import deepspeed
from graftc.specs.errors.diagnostics import GraftError

COPIED = ("accepts_loss_kwargs", "base_model_prefix", "loss_type", "model_tags", "name_or_path")
"""Attributes of a source model that a compiled one has as well, as copies."""

_SAVE = "compiled.save(path) writes what was trained, compiled.merge().save(path) a plain transformers folder"

ELSEWHERE = {
    "push_to_hub": _SAVE,
    "from_pretrained": "graftc.load(path) reads what compiled.save wrote",
    "merge_and_unload": "compiled.merge() folds into the weights and certifies the result",
    "unload": "compiled.disabled() computes what the base computes; the source model is as it was",
    "disable_adapter": "with compiled.disabled(): computes what the base computes, disabled(name) leaves one out",
    "get_base_model": "the source model that was compiled is as it was",
    "add_adapter": "compiled.add({...}) adds an adaptation, as an entry of a spec's adapt list",
    "delete_adapter": "compiled.remove(name) removes an adaptation",
    "disable_adapters": "compiled.disable(name) leaves an adaptation out until compiled.enable(name)",
    "enable_adapters": "compiled.enable(name) undoes compiled.disable(name)",
    "set_adapter": "compiled.activate(name) chooses from a bank, compiled.train_only(name) what trains",
    "resize_token_embeddings": "tokens: {add: ...} in the spec gives the table new rows that train",
    "set_input_embeddings": "change the source model before it is compiled",
    "set_output_embeddings": "change the source model before it is compiled",
    "set_attn_implementation": "change the source model before it is compiled",
    "add_weighted_adapter": "compiled.combine(...) joins trained adaptations",
}
"""Names that the models of other libraries have, with what does the same here."""


def taken_over(model: nn.Module) -> dict[str, Any]:
    """Return copies of what a source model says about itself, by name; names of its children are left out."""
    attributes = copies_of(model, COPIED)
    if not isinstance(attributes.get("accepts_loss_kwargs"), bool):  # decided as the Trainer does
        rest = inspect.signature(model.forward).parameters.values()
        attributes["accepts_loss_kwargs"] = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in rest)
    return attributes


def copies_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return copies of those attributes that a model has, by name; names of its children are left out."""
    own = (name for name in names if hasattr(model, name) and name not in children_of(model))
    return copy.deepcopy({name: getattr(model, name) for name in own})


class NotHereError(GraftError, AttributeError):
    """A coded error for an attribute that does not exist, so that ``hasattr`` returns False."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = ""  # otherwise Python fills in the attribute's, which a Root takes to mean that it is missing


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Raise an error that says how to keep a model instead of pickling it.

    Raises:
        GraftError: GC074.
    """
    message = f"{type(module).__name__} cannot be pickled: its graphs are code, which no file should hold"
    hint = "model.save(path) keeps all of it; torch.save(model.state_dict(), path) what trains; copy.deepcopy copies it"
    raise GraftError("GC074", message, hint=hint)


def refuse_deepspeed() -> None:
    """Raise if Accelerate, and so the Trainer, is set to use DeepSpeed, with which a compiled model does not train.

    Raises:
        GraftError: GC072.
    """
    state = sys.modules.get("accelerate.state")
    # The state of a process that has none yet would be made by asking for it.
    if state is not None and state.is_initialized() and getattr(state.AcceleratorState(), "deepspeed_plugins", None):
        raise deepspeed()
