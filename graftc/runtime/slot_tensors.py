"""The tensors of a bank's slots: the adapters' values, their names, and which of them is active."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from graftc.compat.tensors import version_of
from graftc.compiler.resolve.compose import ACTIVE
from graftc.compiler.resolve.slots import NAMES, decoded, encoded
from graftc.passes.core.weights.changes import TensorChanges
from graftc.passes.core.weights.names import adapter_name, owner_of
from graftc.passes.core.weights.store import Store
from graftc.specs.compose import Bank

Values = Mapping[str, Tensor]
"""An adapter's tensors as a slot stores them, by the names of the bank's tensors; those that are left out are zero."""


class SlotTensors:
    """The tensors of the slots of one bank in one Store."""

    def __init__(self, bank: Bank, store: Store) -> None:
        self.bank = bank
        self._store = store
        self._read_at: tuple[Tensor, int] | None = None
        self._names: list[str | None] = []
        self._fqns: tuple[str, ...] = ()

    @property
    def changes(self) -> TensorChanges:
        """The changes of the Store."""
        return self._store.changes  # looked up each time, since a Store is copied after its banks

    @property
    def names(self) -> list[str | None]:
        """The name of the adapter in each slot; None for an empty slot."""
        with self.changes.condition:
            own = self._own(NAMES)
            if self._read_at is None or self._read_at[0] is not own or self._read_at[1] != version_of(own):
                self._read_at, self._names = (own, version_of(own)), decoded(own)
            return list(self._names)

    def put_name(self, slot: int, name: str | None) -> None:
        """Write the name of a slot."""
        with torch.no_grad():
            own = self._own(NAMES)
            own[slot] = encoded([name], own.device)[0]
        self._read_at = None

    @property
    def active(self) -> int:
        """The slot that calls use if they choose none; it is never empty."""
        return int(self._own(ACTIVE))

    def put_active(self, slot: int) -> None:
        """Write which slot calls use if they choose none."""
        with torch.no_grad():
            self._own(ACTIVE).fill_(slot)

    def _own(self, part: str) -> Tensor:
        return self._store.get(adapter_name("", str(self.bank.name), part))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The tensors of all slots, ``[slots, ...]``, by name."""
        if not self._fqns:  # a bank's tensors keep their names, unlike other adaptations'
            own = (fqn for fqn, _ in self._store.adapters() if owner_of(fqn) == self.bank.name)
            self._fqns = tuple(fqn for fqn in own if fqn.rpartition(".")[2] not in (ACTIVE, NAMES))
        return {fqn: self._store.get(fqn).detach() for fqn in self._fqns}

    def write(self, slot: int, values: Values) -> None:
        """Write an adapter to a slot that no call uses."""
        with torch.no_grad():
            for fqn, tensor in self.tensors.items():
                if fqn in values:
                    tensor[slot].copy_(values[fqn])
                else:
                    tensor[slot].zero_()

    def read(self, slot: int) -> dict[str, Tensor]:
        """Return a copy of a slot's tensors, by the names of the bank's."""
        return {fqn: tensor[slot].clone() for fqn, tensor in self.tensors.items()}
