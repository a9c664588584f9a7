"""What transformers records about models and does while they generate, without a public name for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch import nn

T = TypeVar("T")

ABOUT_ORIGIN = frozenset(
    {"name_or_path", "_name_or_path", "_commit_hash", "_original_object_hash", "_output_capturing_hooks_installed"}
)
"""Attributes that say where a model came from, or whether it has run, and a hash that is another in each process."""

LOADING_OPTIONS = ("_commit_hash", "_from_auto")
"""Options that ``Auto`` classes add to those of ``from_pretrained``."""


def path_of(config: Any) -> str | None:
    """Return what a model was loaded by, as its config records it.

    The public field of transformers' configs is missing in those of diffusers, which record the same.
    """
    path: str | None = getattr(config, "_name_or_path", None)
    return path


def commit_of(config: Any) -> str | None:
    """Return the commit of the hub's repository that a config was loaded from; no public field has it."""
    commit: str | None = getattr(config, "_commit_hash", None)
    return commit


def set_commit(config: Any, commit: str) -> None:
    """Record the commit that a config was loaded from where transformers does."""
    config._commit_hash = commit


def attention_of(config: Any) -> str:
    """Return the name of the attention that a config chooses, which a public argument sets and nothing public gives."""
    return str(getattr(config, "_attn_implementation", None))


def not_quantised(config: Any) -> None:
    """Remove the mark of a quantised model from a config, which stops graftc's own models from being changed."""
    vars(config).pop("_is_quantized", None)


def leave_as_it_is(module: nn.Module) -> None:
    """Keep ``from_pretrained`` from initialising the tensors of a module, which it does not find in the files."""
    module._is_hf_initialized = True  # type: ignore[assignment]


def export_patches() -> dict[str, list[Any]] | None:
    """Return the patches that transformers applies to its models for an export, by kind of exporter.

    Each is a list whose items begin with the path of what is patched; changes of it change what is applied. None if a
    version of transformers keeps no such lists.
    """
    from transformers.exporters import utils

    patches: dict[str, list[Any]] | None = getattr(utils, "_PATCHES", None)
    return patches


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
    """Return the classes of models that an ``Auto`` class has for a config; it gives them only to load one."""
    classes = auto._model_mapping.get(type(config), None)
    return tuple(classes) if isinstance(classes, tuple | list) else (classes,)


def given_by_caller(cache: Any) -> None:
    """Mark a cache as the caller's, so that the loop returns it and does not replace it."""
    cache._is_user_defined = True


_STEPS = {
    "rows": "_expand_inputs_for_generation",
    "criteria": "_get_stopping_criteria",
    "compiles": "_valid_auto_compile_criteria",
    "cache": "_prepare_cache_for_generation",
}


def loop_steps(**steps: Callable[..., Any]) -> Callable[[type[T]], type[T]]:
    """Return a decorator for a class that changes steps of transformers' loop, to put in front of a model's class.

    The loop calls methods with underscores, and nothing else lets code into it at these places.

    Args:
        steps: what replaces a step: ``rows`` repeats the inputs for each text that a row of the prompt becomes,
            ``criteria`` returns what ends a text, ``compiles`` whether the loop may compile the forward, ``cache`` puts
            a cache among the arguments of calls. Each is called with the object, the step that it replaces, and the
            arguments of the step.
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
    """Decorate the class that a model's attributes come from: its files leave no tensor out.

    The `Trainer` asks each model for this when a checkpoint has fewer tensors than the model.
    """
    cls._keys_to_ignore_on_save = None  # type: ignore[attr-defined]
    return cls


def takes_tokens_back(cls: type[T]) -> type[T]:
    """Decorate a model's class: its cache can be cut, which assisted generation asks of each model."""
    cls._is_stateful = False  # type: ignore[attr-defined]
    return cls
