"""Detect swapped or misplaced arguments of `compile` and similar functions by their kinds."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from graftc.runtime.sources.folder_kinds import is_adapter, reader_of
from graftc.specs.base_model import SpecModel
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import shown
from graftc.specs.foreign import is_foreign

_OTHERS = ("a tokenizer", "example inputs", "a transformers config")
_SPECS = ("a spec", "a PEFT config")


def check_spec_and_model(function: str, spec: Any, model: Any, call: str = "spec, model") -> None:
    """Raise an error if the spec or the model is another kind of object used in training, such as a tokenizer.

    Args:
        function: the name of the function that was called, for the hint.
        spec, model: its first two arguments.
        call: the names of its arguments, for the hint.

    Raises:
        GraftError: GC073.
    """
    one, two = _kind(spec), _kind(model)
    usage = f"{function}({call})"
    if one in ("a model", *_OTHERS):
        message = f"expected a spec, got {one}: {_shown(spec)}"
        if one == "a model" and two in (*_SPECS, "a path"):
            raise _swapped(message, two, usage)
        raise GraftError("GC073", message, hint=f"{usage}: first what to adapt, then the model")
    if two in (*_SPECS, *_OTHERS):
        message = f"expected a model, got {two}: {_shown(model)}"
        raise GraftError("GC073", message, hint=f"{usage}: the model is an nn.Module")


def check_folder_and_model(function: str, folder: Any, model: Any, *, by_name: bool = False) -> None:
    """Raise an error if a folder, or the model to which its files belong, is another kind of object used in training.

    Args:
        function: the name of the function that was called, for the hint.
        folder, model: its first two arguments; both may be None.
        by_name: whether the model may also be passed as a path or an id.

    Raises:
        GraftError: GC073.
    """
    one, two = _kind(folder), _kind(model)
    usage = f"{function}(folder, model)"
    if one in ("a model", *_SPECS, *_OTHERS) and not _are_paths(folder):
        message = f"expected a folder, got {one}: {_shown(folder)}"
        if one == "a model" and (two == "a path" or _are_paths(model)):
            raise _swapped(message, "a path" if two == "a path" else "paths", usage)
        hint = f"{usage}: first the folder of the files, then their base"
        if one in _SPECS:
            hint = "use graftc.compile(spec, model) to adapt a model by a spec"
        raise GraftError("GC073", message, hint=hint)
    if two in (*_SPECS, *_OTHERS) or (two == "a path" and not by_name):
        message = f"expected a model, got {two}: {_shown(model)}"
        reader = reader_of(as_path(model)) if two == "a path" and model else None
        raise GraftError("GC073", message, hint=f"{usage}: {reader or 'the model is an nn.Module'}")


def check_adapter_and_base(function: str, adapter: Any, base: Any) -> None:
    """Raise an error if an adapter's folder and its base's folder are swapped, or if something else was passed.

    Args:
        function: the name of the function that was called, for the hint.
        adapter, base: its first two arguments; the second may be None.

    Raises:
        GraftError: GC073.
    """
    usage = f"{function}(adapter, model)"
    for value, place in ((adapter, "adapter"), (base, "base")):
        if (kind := _kind(value)) not in ("", "a path"):
            message = f"expected the folder of the {place}, got {kind}: {_shown(value)}"
            raise GraftError("GC073", message, hint=f"{usage}: pass folders; compiled.merge() merges in memory")
    if _kind(adapter) == _kind(base) == "a path" and is_adapter(as_path(base)) and not is_adapter(as_path(adapter)):
        message = f"expected the base's folder, got an adapter: {_shown(base)}"
        raise GraftError("GC073", message, hint=f"swap them: {usage}")


def _swapped(message: str, other: str, usage: str) -> GraftError:
    return GraftError("GC073", f"{message}; expected a model, got {other}", hint=f"swap them: {usage}")


def _shown(value: Any) -> str:
    return shown(os.fspath(value)) if isinstance(value, str | os.PathLike) else f"a {type(value).__name__}"


def _are_paths(value: Any) -> bool:
    """Return whether a value is a non-empty sequence or mapping of paths."""
    values = list(value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ())
    return bool(values) and all(isinstance(path, str | os.PathLike) for path in values)


def _kind(value: Any) -> str:
    """Return, in words, what kind of object used in training a value is; an empty string for any other value."""
    mapping = value if isinstance(value, Mapping) else {}
    several = value if isinstance(value, list | tuple) else ()
    kinds = (
        ("a model", isinstance(value, nn.Module)),
        ("a path", isinstance(value, str | os.PathLike)),
        ("a PEFT config", is_foreign(value)),
        ("a spec", isinstance(value, SpecModel)),
        ("a tokenizer", _is_a(value, "transformers.tokenization_utils_base", "PreTrainedTokenizerBase")),
        ("a tokenizer", _is_a(value, "transformers.processing_utils", "ProcessorMixin")),
        ("a transformers config", _is_a(value, "transformers.configuration_utils", "PreTrainedConfig")),
        ("example inputs", isinstance(value, torch.Tensor)),
        ("example inputs", any(isinstance(part, torch.Tensor) for part in mapping.values())),
        ("example inputs", bool(several) and all(isinstance(part, torch.Tensor) for part in several)),
        ("a spec", "adapt" in mapping or "patterns" in mapping),
    )
    return next((kind for kind, fits in kinds if fits), "")


def _is_a(value: Any, module: str, name: str) -> bool:
    """Return whether a value is an instance of a class, without importing the class's module."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)
