"""transformers' private attributes of models and configs, and private steps of its generation loop."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

ABOUT_ORIGIN = frozenset(
    {"name_or_path", "_name_or_path", "_commit_hash", "_original_object_hash", "_output_capturing_hooks_installed"}
)
"""Attributes that record where a model came from, or whether it has run, and a hash that differs between processes."""

OF_A_PROCESS = "SESSION_ID"
"""A constant of transformers that differs between processes: it identifies downloads."""

LOADING_OPTIONS = ("_commit_hash", "_from_auto")
"""Options that ``Auto`` classes add to those of ``from_pretrained``."""

LOOP_ARGUMENTS = frozenset({"tokenizer", "assistant_tokenizer"})
"""Arguments of ``generate`` that the loop passes on to the model, where ``**kwargs`` absorbs them."""

GROWING = (None, "dynamic", "dynamic_full")
"""Values of ``cache_implementation`` for a cache that grows; early releases set the last one themselves for assistants.

It is a cache whose layers keep all tokens, as all growing caches here do.
"""


def path_of(config: Any) -> str | None:
    """Return the name or path that a model was loaded from, as its config records it.

    diffusers' configs lack the public field of transformers' configs, but record the same value.
    """
    path: str | None = getattr(config, "_name_or_path", None)
    return path


def commit_of(config: Any) -> str | None:
    """Return the commit of the hub repository that a config was loaded from; no public field contains it."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def set_commit(config: Any, commit: str) -> None:
    """Record the commit that a config was loaded from in the place where transformers records it."""
    config._commit_hash = commit


def attention_of(config: Any) -> str:
    """Return the name of a config's attention implementation, which can be set publicly but not read."""
    return str(getattr(config, "_attn_implementation", None))


def not_quantised(config: Any) -> None:
    """Remove the flag for a quantised model from a config; it would prevent changes to graftc's own models."""
    vars(config).pop("_is_quantized", None)


def leave_as_it_is(module: nn.Module) -> None:
    """Keep ``from_pretrained`` from initialising a module's tensors, although they are not in the files."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def export_patches() -> dict[str, list[Any]] | None:
    """Return the patches that transformers applies to its models for an export, by kind of exporter.

    Each is a list whose items begin with the path of the patched object; changes to the list change what is applied.
    The result is None if a version of transformers has no such lists, or has imported the objects by then (5.13).
    """
    from transformers.exporters import utils

    patches: dict[str, list[Any]] | None = getattr(utils, "_PATCHES", None)
    if patches is None or any(not isinstance(patch[0], str) for kind in patches.values() for patch in kind):
        return None
    return patches


def recorded_outputs() -> dict[str, Any] | None:
    """Return the registry of the outputs to record of every model class used in the process, by the class's ``repr``.

    It is a global that the code of every model mentions; None if no such code has been imported.
    """
    module: Any = sys.modules.get("transformers.utils.output_capturing")
    registry: dict[str, Any] | None = None if module is None else module._CAN_RECORD_REGISTRY
    return registry


def auto_classes() -> Iterator[Any]:
    """Yield the ``Auto`` classes that load models; transformers has no list of them."""
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.auto_factory import _BaseAutoModelClass

    for kind in vars(modeling_auto).values():
        if isinstance(kind, type) and issubclass(kind, _BaseAutoModelClass):
            mapping: Any = kind._model_mapping
            if mapping is not None:
                yield kind


def loaded_by(auto: Any, config: Any) -> tuple[type, ...]:
    """Return the model classes that an ``Auto`` class has for a config; its public methods only load models."""
    classes = auto._model_mapping.get(type(config), None)
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


def given_by_caller(cache: Any) -> None:
    """Mark a cache as the caller's, so that the generation loop returns it instead of replacing it."""
    cache._is_user_defined = True


_STEPS = {
    "rows": "_expand_inputs_for_generation",
    "criteria": "_get_stopping_criteria",
    "compiles": "_valid_auto_compile_criteria",
    "cache": "_prepare_cache_for_generation",
    "candidates": "_get_candidate_generator",
}


def loop_steps(**steps: Callable[..., Any]) -> Callable[[type[T]], type[T]]:
    """Return a decorator for a mixin, placed before a model's class in the MRO, that changes steps of the loop.

    transformers' loop calls private methods, and there is no other way to run code at these points.

    Args:
        steps: replacements for steps: ``rows`` repeats the inputs for each text generated from a row of the prompt,
            ``criteria`` returns the stopping criteria, ``compiles`` returns whether the loop may compile the forward
            pass, ``cache`` adds a cache to the arguments of calls, and ``candidates`` returns what proposes tokens in
            assisted generation. Each is called with the object, the step that it replaces, and the arguments of the
            step.
    """

    def decorate(cls: type[T]) -> type[T]:
        for step, function in steps.items():
            setattr(cls, _STEPS[step], _step(cls, _STEPS[step], function))
        return cls

    return decorate


def _step(cls: type, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        return function(self, getattr(super(cls, self), name), *args, **kwargs)

    return step


def saves_all_keys(cls: type[T]) -> type[T]:
    """Decorate the class that provides a model's attributes, so that saved files leave out no tensors.

    The `Trainer` reads this attribute of each model when a checkpoint has fewer tensors than the model.
    """
    cls._keys_to_ignore_on_save = None  # type: ignore[attr-defined]
    return cls


def takes_tokens_back(cls: type[T]) -> type[T]:
    """Decorate a model's class to declare that its cache can be cropped, which assisted generation requires.

    Since 5.25, transformers asks the cache instead.
    """
    cls._is_stateful = False  # type: ignore[attr-defined]
    return cls
