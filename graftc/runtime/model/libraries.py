"""Attributes and methods that other libraries expect on a model, copied from the source or replaced."""

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
"""Attributes of a source model that are copied to a compiled model."""

_SAVE = "compiled.save(path) writes what was trained, compiled.merge().save(path) a plain transformers folder"

ELSEWHERE = {
    "push_to_hub": _SAVE,
    "from_pretrained": "graftc.load(path) reads what compiled.save wrote",
    "merge_and_unload": "compiled.merge() folds into the weights and certifies the result",
    "unload": "compiled.disabled() computes what the base computes; the source model is unchanged",
    "disable_adapter": "with compiled.disabled(): computes what the base computes; disabled(name) leaves one out",
    "get_base_model": "the source model that was compiled is unchanged",
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
"""Names that models of other libraries have, each with a hint about the equivalent here."""


def taken_over(model: nn.Module) -> dict[str, Any]:
    """Return copies of the attributes that describe a source model, by name; names of its children are left out."""
    attributes = copies_of(model, COPIED)
    if not isinstance(attributes.get("accepts_loss_kwargs"), bool):  # use the Trainer's criterion
        rest = inspect.signature(model.forward).parameters.values()
        attributes["accepts_loss_kwargs"] = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in rest)
    return attributes


def copies_of(model: nn.Module, names: Iterable[str]) -> dict[str, Any]:
    """Return copies of the given attributes that a model has, by name; names of its children are left out."""
    own = (name for name in names if hasattr(model, name) and name not in children_of(model))
    return copy.deepcopy({name: getattr(model, name) for name in own})


class NotHereError(GraftError, AttributeError):
    """A `GraftError` for an attribute that does not exist, so that ``hasattr`` returns False."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.name = ""  # otherwise Python sets the attribute's name, and a Root would raise its own error


def refuse_pickling(module: nn.Module) -> NoReturn:
    """Raise an error that explains how to save a model instead of pickling it.

    Raises:
        GraftError: GC074.
    """
    message = f"{type(module).__name__} cannot be pickled: its graphs are code, which no file should contain"
    hint = "model.save(path) saves all of it, torch.save(model.state_dict(), path) what trains; copy.deepcopy copies it"
    raise GraftError("GC074", message, hint=hint)


def refuse_deepspeed() -> None:
    """Raise if Accelerate (and so the Trainer) is configured for DeepSpeed, with which a compiled model cannot train.

    Raises:
        GraftError: GC072.
    """
    state = sys.modules.get("accelerate.state")
    # Reading the state would create it in a process that has none yet.
    if state is not None and state.is_initialized() and getattr(state.AcceleratorState(), "deepspeed_plugins", None):
        raise deepspeed()
