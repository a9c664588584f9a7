"""Choose among the adaptations of banks, for later calls or permanently."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.compose import ACTIVE
from graftc.compiler.resolve.slots import NAMES
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.weights.names import adapter_name, owner_of, renamed
from graftc.runtime.model.choices import slot_names, slot_of
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.offered.slot_bank import SlotBank
from graftc.runtime.slots import Slots
from graftc.specs.base import check_name
from graftc.specs.compose import Bank, CompositionSpec
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, unknown_name

Choice = str | int | Mapping[str, float]
"""A slot by name or index, or a mixture of slots, with a weight for each slot that takes part."""


class Choosing(Feature):
    """Chooses among the adaptations of banks, for later calls or permanently."""

    def activate(self, choice: str | int, bank: str | None = None) -> None:
        """Choose the adaptation for calls that do not choose one themselves.

        No graph changes, so the choice may differ from call to call.

        Args:
            choice: an adaptation's name, or the index of its slot.
            bank: the bank's name; needed only if there are several.

        Raises:
            GraftError: GC038 if there is no such slot, GC091 if there is no such bank.
        """
        composition, compilation = _bank(self.runner.compilation.spec, bank), self.runner.compilation
        if (slots := Slots.of(composition, compilation.store)) is not None:
            slots.activate(choice)
        else:
            self._active_slot(composition).fill_(slot_of(compilation, composition, choice))

    def active(self, bank: str | None = None) -> str:
        """Return the name of the adaptation for calls that do not choose one themselves.

        Args:
            bank: the bank's name; needed only if there are several.

        Raises:
            GraftError: GC091 if there is no such bank.
        """
        composition = _bank(self.runner.compilation.spec, bank)
        return slot_names(self.runner.compilation, composition)[int(self._active_slot(composition))]

    def _active_slot(self, bank: CompositionSpec) -> Tensor:
        return self.runner.compilation.store.get(adapter_name("", str(bank.name), ACTIVE))

    def bank(self, name: str | None = None) -> SlotBank:
        """Return the slots of a bank, to which adapters can be added while the model runs.

        Args:
            name: the bank's name; needed only if there are several.

        Raises:
            GraftError: GC091 if there is no such bank, GC190 if the spec gives it no ``slots``.
        """
        return SlotBank(self.runner, _bank(self.runner.compilation.spec, name))

    def train_only(self, *names: str) -> None:
        """Train only the named adaptations from now on, or all of them if none is named.

        The tensors of all others no longer require gradients, so that no optimiser changes them, not even by weight
        decay.

        Args:
            names: adaptations or compositions.

        Raises:
            GraftError: GC091 if there is no such adaptation.
        """
        known = [*self.runner.compilation.spec.owners, TRAIN]
        for name in names:
            if name not in known:
                raise unknown_name("adaptation", name, known)
        for fqn, tensor in self._trainable().items():
            tensor.requires_grad_(not names or owner_of(fqn) in names)

    def _trainable(self) -> dict[str, Tensor]:
        """Return the adapter tensors that train when every adaptation trains, by name."""
        adapters = self.runner.store.adapters
        return self.runner.once(
            "trainable", lambda: {fqn: tensor for fqn, tensor in adapters() if tensor.requires_grad}
        )

    @in_every_process
    def fix(self, choice: Choice, bank: str | None = None) -> Any:
        """Return a compiled model in which a bank is permanently replaced by one adaptation, without a slot axis.

        The result folds and exports like any other model. This model is unchanged, and the two share no adapter
        tensors.

        Args:
            choice: an adaptation's name, the index of its slot, or a weight for each adaptation that takes part; their
                weighted tensors are added up.
            bank: the bank's name; needed only if there are several.

        Raises:
            GraftError: GC038 if there is no such slot, GC091 if there is no such bank.
        """
        compilation = self.runner.compilation
        composition = _bank(compilation.spec, bank)
        slots = Slots.of(composition, compilation.store)
        if isinstance(choice, Mapping):
            factors = dict(choice)
        else:
            factors = {slot_names(compilation, composition)[slot_of(compilation, composition, choice)]: 1.0}
        for name in factors:
            slot_of(compilation, composition, name)
        if not factors:
            raise GraftError("GC038", f"no adaptation is chosen from {composition.name!r}")
        first = next(iter(factors))
        name = first if len(factors) == 1 and check_name(first) is None else str(composition.name)
        spec = _without(compilation.spec, composition, first if slots is None else composition.members[0], name)
        values = _values(compilation, composition, factors, name)
        if slots is not None:
            with slots.use(list(factors)) as numbers:
                for fqn, tensor in slots.tensors.items():
                    terms = [tensor[n] * f for n, f in zip(numbers, factors.values(), strict=True)]
                    values[renamed(fqn, name)] = torch.stack(terms).sum(0)
        return self.runner.sibling(spec, values)


def _bank(spec: Spec, name: str | None) -> Bank:
    banks = {str(c.name): c for c in spec.compose if isinstance(c, Bank)}
    if name is None and len(banks) == 1:
        return next(iter(banks.values()))
    if name is None:
        raise GraftError("GC091", "the bank's name is missing", hint=f"the banks are: {', '.join(banks) or 'none'}")
    if name not in banks:
        raise unknown_name("bank", name, banks)
    return banks[name]


def _without(spec: Spec, bank: CompositionSpec, like: str, name: str) -> Spec:
    """Return the spec with one adaptation named ``name`` instead of a bank."""
    adapt = tuple(
        a.model_copy(update={"name": name}) if a.name == like else a
        for a in spec.adapt
        if a.name == like or a.name not in bank.members
    )
    compose = []
    for composition in spec.compose:
        if composition is bank:
            continue
        renamed = tuple(name if member == bank.name else member for member in composition.members)
        compose.append(composition.model_copy(update={composition.kind: renamed}))
    return spec.model_copy(update={"adapt": adapt, "compose": tuple(compose)})


def _values(
    compilation: Compilation, bank: CompositionSpec, factors: Mapping[str, float], name: str
) -> dict[str, Tensor]:
    """Return the adapter tensors, with those of the bank added up under one name."""
    values: dict[str, Tensor] = {}
    terms: dict[str, list[Tensor]] = {}
    for fqn, tensor in adapter_values(compilation.store):
        owner = owner_of(fqn)
        target = renamed(fqn, name)
        if owner == bank.name:
            values |= {target: tensor} if fqn.rpartition(".")[2] not in (ACTIVE, NAMES) else {}
        elif owner in factors:
            terms.setdefault(target, []).append(tensor if factors[owner] == 1 else tensor * factors[owner])
        elif owner not in bank.members:
            values[fqn] = tensor
    return values | {target: each[0] if len(each) == 1 else torch.stack(each).sum(0) for target, each in terms.items()}
