"""Track tensors that a model's checkpoint lacks; such tensors are random, and allowed only if they train in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from torch import nn

from graftc.specs.errors.diagnostics import GraftError

if TYPE_CHECKING:
    from graftc.compiler.compilation import Compilation

_FRESH: WeakKeyDictionary[nn.Module, tuple[str, tuple[str, ...]]] = WeakKeyDictionary()
_SHOWN = 5


def mark_fresh(model: nn.Module, names: Iterable[str], where: str) -> None:
    """Record a model's randomly drawn tensors: those for which ``where`` has no tensor of the same name and size."""
    fresh = tuple(sorted(names))
    if fresh:
        _FRESH[model] = (where, fresh)


def same_fresh(model: nn.Module, other: nn.Module) -> nn.Module:
    """Mark a copy of a model as lacking the same tensors, and return the copy."""
    if model in _FRESH:
        _FRESH[other] = _FRESH[model]
    return other


def check_fresh(compilation: Compilation) -> None:
    """Refuse a base with random tensors, unless the spec trains each of them in full.

    Raises:
        GraftError: GC089 naming the tensors.
    """
    canonical = compilation.store.canonical
    trained = (canonical(name) for name in compilation.tensor_edits.trained_in_full())
    require_weights(compilation.source, trained, canonical)


def require_weights(model: nn.Module, trained: Iterable[str] = (), canonical: Callable[[str], str] = str) -> None:
    """Refuse a model whose checkpoint lacks tensors.

    Args:
        model: the model.
        trained: names of tensors that train in full, which may be missing.
        canonical: maps each of a tensor's names to the one that owns the tensor.

    Raises:
        GraftError: GC089 naming the missing tensors that do not train.
    """
    where, names = _FRESH.get(model, ("", ()))
    known = set(trained)
    lacking = [name for name in names if canonical(name) not in known]
    if not lacking:
        return
    count = f"{len(lacking)} tensors" if len(lacking) > 1 else "a tensor"
    more = [f"... and {len(lacking) - _SHOWN} more"] if len(lacking) > _SHOWN else []
    modules = sorted({name.rpartition(".")[0] for name in lacking})
    hint = "use a complete checkpoint"
    if len(modules) <= _SHOWN:
        hint += f", or train the new modules in full: train: [{', '.join(modules)}]"
    raise GraftError(
        "GC089",
        f"{where} lacks {count} of {type(model).__name__}, which would be random",
        hint=hint,
        details=[*lacking[:_SHOWN], *more],
    )
