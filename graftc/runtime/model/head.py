"""The vocabulary head, for training loops that compute the logits themselves."""

from __future__ import annotations

from typing import Any, NoReturn, cast

from torch import Tensor, nn

from graftc.compat.modules import buffers_of, parameters_of
from graftc.passes.core.weights.containers import additions
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.tensor_edits import EditMode, TensorEdit, TensorEdits
from graftc.specs.errors.diagnostics import GraftError


class Head(nn.Module):
    """A head that ``train:`` or an adaptation has changed; its ``weight`` and ``bias`` are those that the model uses.

    It owns no tensors. Both are read from the model at every access, and gradients reach the trained tensors.

    Args:
        store: the tensors.
        path: the path of the head's module.
        edits: the edits that adaptations make to stored tensors.
    """

    def __init__(self, store: Store, path: str, edits: TensorEdits) -> None:
        super().__init__()
        self._store, self._path, self._edits = store, path, edits

    @property
    def weight(self) -> Tensor:
        """The weight, ``[vocabulary, hidden]``, as it is stored.

        Raises:
            GraftError: GC072 if the head is adapted in any way other than by training it or some of its rows.
        """
        return cast(Tensor, self._tensor("weight"))

    @property
    def bias(self) -> Tensor | None:
        """The bias, ``[vocabulary]``; None if the head has none.

        Raises:
            GraftError: as for `weight`.
        """
        return self._tensor("bias")

    def forward(self, *_: Any) -> NoReturn:
        """Refuse a call, because the graphs of the whole model compute the head.

        Raises:
            GraftError: GC043.
        """
        raise GraftError("GC043", f"{self._path} computes nothing by itself", hint="call the compiled model")

    def _tensor(self, name: str) -> Tensor | None:
        module = self._store.owner(self._path)
        tensor: Tensor | None = {**buffers_of(module), **parameters_of(module)}.get(name)
        if tensor is None:
            return None
        copies, others = _changes(self._store, self._path, self._edits)
        if others:
            message = f"the head {self._path} is adapted by {others[0]!r}, which its weight alone does not include"
            hint = f"leave the head out of {others[0]!r}, or train it itself: train: [{self._path}] in the spec"
            raise GraftError("GC072", message, hint=hint)
        for edit in copies:
            if edit.own.tensor == _owning(self._store, f"{self._path}.{name}"):
                trained, own = self._store.get(edit.trained).to(tensor.dtype), edit.own  # cast as in graphs
                tensor = trained if own.whole else tensor.index_copy(own.axis, own.index(tensor.device), trained)
        return tensor


def head_at(store: Store, path: str, edits: TensorEdits) -> nn.Module:
    """Return the head at a path: the tree's module, or a `Head` if adaptations change its weight."""
    copies, others = _changes(store, path, edits)
    return Head(store, path, edits) if copies or others else store.owner(path)


def _changes(store: Store, path: str, edits: TensorEdits) -> tuple[list[TensorEdit], list[str]]:
    """Return the edits that train copies of a head's tensors, and the owners of other changes to it."""
    module = store.owner(path)
    names = [_owning(store, f"{path}.{name}") for name in (*parameters_of(module), *buffers_of(module))]
    every = [edit for name in names for edit in edits.at(name)]
    copies = [edit for edit in every if edit.mode is EditMode.TRAINED]
    others = [edit.owner for edit in every if edit.mode is EditMode.REPLACED]
    others += [e.owner for e in every if e.mode is EditMode.ADDED and e.site is not None and e.site.module == path]
    others += [name for name in additions(module) if name not in {edit.owner for edit in copies}]
    return copies, others


def _owning(store: Store, name: str) -> str:
    return store.aliases.get(name, name)
