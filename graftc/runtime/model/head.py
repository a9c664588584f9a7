"""The head over the vocabulary as training loops read it that compute the logits by themselves."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor, nn

from graftc.passes.core.weights.containers import additions
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.tensor_edits import EditMode, TensorEdit, TensorEdits
from graftc.specs.errors.diagnostics import GraftError


class Head(nn.Module):
    """The head where ``train:`` or an adaptation has changed it: ``weight`` and ``bias`` are those that the model uses.

    It owns no tensor. Both are read from the model whenever they are asked for, and gradients reach what trains.

    Args:
        store: the tensors.
        path: of the head's module.
        edits: what adaptations do with stored tensors.
    """

    def __init__(self, store: Store, path: str, edits: TensorEdits) -> None:
        super().__init__()
        self._store, self._path, self._edits = store, path, edits

    @property
    def weight(self) -> Tensor:
        """``[vocabulary, hidden]``, as it is stored.

        Raises:
            GraftError: GC072 where the head is adapted in other ways than by training it, or some of its rows.
        """
        found = self._tensor("weight")
        assert found is not None
        return found

    @property
    def bias(self) -> Tensor | None:
        """``[vocabulary]``; None where the head has none.

        Raises:
            GraftError: see `weight`.
        """
        return self._tensor("bias")

    def forward(self, *_: Any) -> NoReturn:
        """Refused: what it computes is a part of the graphs of the whole model.

        Raises:
            GraftError: GC043.
        """
        raise GraftError("GC043", f"{self._path} computes nothing by itself", hint="call the compiled model")

    def _tensor(self, name: str) -> Tensor | None:
        held = self._store.owner(self._path)
        found: Tensor | None = held._parameters.get(name)
        if found is None:
            found = held._buffers.get(name)
        if found is None:
            return None
        copies, others = _changes(self._store, self._path, self._edits)
        if others:
            message = f"the head {self._path} is adapted by {others[0]!r}, which its weight alone does not show"
            hint = f"leave the head out of {others[0]!r}; train: [{self._path}] in the spec trains it as it is"
            raise GraftError("GC072", message, hint=hint)
        for edit in copies:
            if edit.own.tensor == _owning(self._store, f"{self._path}.{name}"):
                trained, own = self._store.get(edit.trained).to(found.dtype), edit.own  # as graphs cast it
                found = trained if own.whole else found.index_copy(own.axis, own.index(found.device), trained)
        return found


def head_at(store: Store, path: str, edits: TensorEdits) -> nn.Module:
    """What has the weight of the head at a path: the module of the tree, or a `Head` where that weight is not all."""
    copies, others = _changes(store, path, edits)
    return Head(store, path, edits) if copies or others else store.owner(path)


def _changes(store: Store, path: str, edits: TensorEdits) -> tuple[list[TensorEdit], list[str]]:
    """The edits of a head's tensors by which copies train in their place, and whoever changes it in another way."""
    held = store.owner(path)
    names = [_owning(store, f"{path}.{name}") for name in (*held._parameters, *held._buffers)]
    found = [edit for name in names for edit in edits.at(name)]
    copies = [edit for edit in found if edit.mode is EditMode.TRAINED]
    others = [edit.owner for edit in found if edit.mode is EditMode.REPLACED]
    others += [e.owner for e in found if e.mode is EditMode.ADDED and e.site is not None and e.site.module == path]
    others += [name for name in additions(held) if name not in {edit.owner for edit in copies}]
    return copies, others


def _owning(store: Store, name: str) -> str:
    return store.aliases.get(name, name)
