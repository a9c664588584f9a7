"""Arguments of `compile` and its like that stand in each other's places, told apart by what they are."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign import is_foreign

__all__ = ["check_spec_and_model"]


def check_spec_and_model(function: str, spec: Any, model: Any) -> None:
    """Say what stands in the place of a spec or a model, where it is something else that training has.

    Args:
        function: the name of the function that was called, for the hint.
        spec, model: its first two arguments.

    Raises:
        GraftError: GC073.
    """
    one, two = _kind(spec), _kind(model)
    if one in ("a model", *_OTHERS):
        message = f"{one} stands where the spec goes: a {type(spec).__name__}"
        if one == "a model" and two in ("a spec", "a config of PEFT"):
            message += f", and {two} where the model goes"
            raise GraftError("GC073", message, hint=f"swap them: {function}(spec, model)")
        raise GraftError("GC073", message, hint=f"{function}(spec, model): first what to adapt, then the model")
    if two in ("a spec", "a config of PEFT", *_OTHERS) and not isinstance(model, str):
        message = f"{two} stands where the model goes: a {type(model).__name__}"
        raise GraftError("GC073", message, hint=f"{function}(spec, model): the model is an nn.Module")


_OTHERS = ("a tokenizer", "example inputs", "a config of transformers")


def _kind(value: Any) -> str:
    """What a value is in training, in words; empty for anything else."""
    if isinstance(value, nn.Module):
        return "a model"
    if is_foreign(value):
        return "a config of PEFT"
    if isinstance(value, Spec):
        return "a spec"
    if _is_a(value, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase") or _is_a(
        value, "transformers.processing_utils", "ProcessorMixin"
    ):
        return "a tokenizer"
    if _is_a(value, "transformers.configuration_utils", "PreTrainedConfig"):
        return "a config of transformers"
    if isinstance(value, torch.Tensor):
        return "example inputs"
    if isinstance(value, Mapping):
        if any(isinstance(part, torch.Tensor) for part in value.values()):
            return "example inputs"
        return "a spec" if "adapt" in value else ""
    if isinstance(value, list | tuple) and value and all(isinstance(part, torch.Tensor) for part in value):
        return "example inputs"
    return ""


def _is_a(value: Any, module: str, name: str) -> bool:
    """Whether a value is of a class, which need not have been imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)
