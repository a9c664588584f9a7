"""Build the Store of a merged model."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.certify import Folded
from graftc.compiler.folding.fold_plan import FoldPlan
from graftc.passes.core.weights.names import owner_of
from graftc.passes.core.weights.store import Store


def folded_store(
    compilation: Compilation, fold: FoldPlan, folds: Folded, packed: Mapping[str, tuple[Tensor, ...]], *, full: bool
) -> Store:
    """Return a Store with the folded tensors in place of the base's.

    Args:
        compilation, fold, folds: the compilation, its fold plan and the result of folding.
        packed: the parts of weights that were packed again.
        full: if true, no weight stays packed except those in ``packed``; otherwise weights that did not change stay
            packed.
    """
    store, folded = compilation.store, Store()
    folded.shape(compilation.model)
    parts: set[str] = set()
    for name, tensor in store.weights():
        if name in store.packed:
            own = store.packed[name]
            if name in folds.tensors or (full and name not in packed):
                parts.update(own.names(name))
                value = folds.tensors[name] if name in folds.tensors else store.full(name)
                folded.add_parameter(name, value, trainable=False)
            else:
                stored = packed.get(name) or [store.get(part).detach() for part in own.names(name)]
                folded.add_packed(name, own, stored)
        elif name in folds.tensors:
            folded.add_like(store, name, folds.tensors[name], trainable=False)
        else:
            value = tensor.detach()
            folded.add_like(store, name, value.clone() if name in store.updated else value, trainable=False)
    for name, tensor in store.adapters():
        if owner_of(name) in fold.kept:
            folded.add_like(store, name, tensor.detach(), trainable=False)
    for name in folds.additions:
        folded.add_parameter(name, folds.tensors[name], trainable=False)
    folded.constants = set(store.constants)
    for alias, owner in store.aliases.items():
        if owner not in parts:
            folded.alias(alias, owner)
    return folded
