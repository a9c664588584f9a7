"""Choosing among the adaptations of banks: for each row of a batch, for each call, or for good."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from graftc.compiler.capture.interface import COUNT, dtype_of
from graftc.compiler.capture.isolation import is_traced
from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.compose import ACTIVE
from graftc.compiler.resolve.train import TRAIN
from graftc.passes.core.build.batch import BATCH
from graftc.passes.core.weights.names import adapter_name, owner_of, renamed
from graftc.runtime.model.sharded import in_every_process
from graftc.specs.compose import Bank, CompositionSpec, Parallel
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, nearest, unknown_name

if TYPE_CHECKING:
    from graftc.runtime.compiled import Compiled

Choice = str | int | Mapping[str, float]
"""A slot by name or number, or a mixture of slots: a factor for each that takes part."""


def with_choices(compilation: Compilation, present: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a call with those by which it chooses among adaptations.

    Args:
        compilation: has the banks.
        present: what the source model is called with, by name.
        chosen: inputs of banks as given: tensors, or lists of names and numbers.

    Raises:
        GraftError: GC038 for a choice that does not fit its bank or the batch.
    """
    found = dict(present)
    for name, composition in compilation.controls.items():
        if isinstance(composition, Parallel):
            found = _repeated(compilation, found, name, composition)
        elif chosen.get(name) is not None:
            found |= rows_for(compilation, {name: chosen[name]}, *_rows(compilation, found))
    return found


def rows_for(compilation: Compilation, chosen: Mapping[str, Any], rows: int, device: torch.device) -> dict[str, Tensor]:
    """Inputs of banks, as they are given, for each row.

    Args:
        compilation: has the banks.
        chosen: inputs by name, as for `with_choices`; None counts as absent.
        rows: of the batch.
        device: of numbers that are given as a list.

    Raises:
        GraftError: GC038 for a choice that does not fit its bank or the batch.
    """
    found: dict[str, Tensor] = {}
    for name, composition in compilation.controls.items():
        if not isinstance(composition, Bank) or chosen.get(name) is None:
            continue
        if name == composition.mixture:
            weights = _weights(composition, name, chosen[name], rows, device)
            found[name] = weights.to(dtype_of(compilation.model))
        else:
            found[name] = _ids(composition, name, chosen[name], rows, device)
    return found


def _batched(compilation: Compilation, present: Mapping[str, Any]) -> list[str]:
    """The tensors of a call whose first axis is the batch."""
    known = {spec.name: spec.shape[:1] == (BATCH,) for spec in compilation.program_as_run("train", "base").inputs}
    sure = [n for n, v in present.items() if known.get(n) and isinstance(v, Tensor)]
    rows = present[sure[0]].shape[0] if sure else None
    alike = [n for n, v in present.items() if n not in known and n != COUNT and isinstance(v, Tensor) and v.dim()]
    return sure + [name for name in alike if present[name].shape[0] == rows]


def _rows(compilation: Compilation, present: Mapping[str, Any]) -> tuple[int, torch.device]:
    named = _batched(compilation, present)
    if not named:
        raise GraftError("GC038", "the call has no batch whose rows could choose")
    return present[named[0]].shape[0], present[named[0]].device


def _repeated(
    compilation: Compilation, present: Mapping[str, Any], name: str, composition: CompositionSpec
) -> dict[str, Any]:
    """Every row once for each adaptation, adaptation by adaptation."""
    count = len(composition.members)
    rows, device = _rows(compilation, present)
    batched = set(_batched(compilation, present))
    if COUNT in present:  # the loss stays the mean over all rows
        present = {**present, COUNT: present[COUNT] * count}
    many = {n: v.repeat(count, *(1,) * (v.dim() - 1)) if n in batched else v for n, v in present.items()}
    return {**many, name: torch.arange(count, device=device).repeat_interleave(rows)}


def _ids(bank: Bank, name: str, given: Any, rows: int, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor):
        listed = [given] if isinstance(given, str | int) else list(given)
        given = torch.tensor([slot_of(bank, item) for item in listed], device=device)
    elif not is_traced() and given.device.type == "cpu" and given.numel():
        low, high = int(given.min()), int(given.max())
        if low < 0 or high >= len(bank.bank):
            bad = low if low < 0 else high
            raise GraftError("GC038", f"{name} has {bad}; {bank.name!r} has slots 0 to {len(bank.bank) - 1}")
    if given.dim() != 1 or given.is_floating_point() or given.shape[0] not in (1, rows):
        message = f"{name} is {str(given.dtype).removeprefix('torch.')}{list(given.shape)}"
        raise GraftError("GC038", message, hint=f"give one whole number for each of the {rows} rows")
    chosen: Tensor = given.to(torch.int64).expand(rows)
    return chosen


def _weights(bank: Bank, name: str, given: Any, rows: int, device: torch.device) -> Tensor:
    if not isinstance(given, Tensor):
        given = torch.tensor(given, device=device)
    slots = len(bank.bank)
    if not given.is_floating_point() or given.shape[-1:] != (slots,) or given.shape[:-1] not in ((), (1,), (rows,)):
        message = f"{name} is {str(given.dtype).removeprefix('torch.')}{list(given.shape)}"
        raise GraftError("GC038", message, hint=f"give a weight for each of the {rows} rows and {slots} slots")
    chosen: Tensor = given.expand(rows, slots)
    return chosen


def slot_of(bank: CompositionSpec, choice: str | int) -> int:
    """The number of a slot.

    Raises:
        GraftError: GC038 where there is no such slot.
    """
    members = list(bank.members)
    if isinstance(choice, int) and not isinstance(choice, bool) and 0 <= choice < len(members):
        return choice
    if choice in members:
        return members.index(str(choice))
    close = nearest(choice, members) if isinstance(choice, str) else []
    hint = f"did you mean {close[0]!r}?" if close else f"the slots are: {', '.join(members)}"
    raise GraftError("GC038", f"{bank.name!r} has no slot {choice!r}", hint=hint)


class Choosing:
    """The part of `Compiled` that chooses among the adaptations of banks."""

    _compilation: Compilation
    device: torch.device
    sibling: Callable[..., Compiled]

    def activate(self, choice: str | int, bank: str | None = None) -> None:
        """Choose the adaptation that calls use which choose none. No graph changes: it may differ from call to call.

        Args:
            choice: an adaptation's name, or the number of its slot.
            bank: the bank's name, where there are several.

        Raises:
            GraftError: GC038 where there is no such slot, GC091 where there is no such bank.
        """
        found = _bank(self._compilation.spec, bank)
        slot = slot_of(found, choice)
        self._compilation.store.get(adapter_name("", str(found.name), ACTIVE)).fill_(slot)

    def active(self, bank: str | None = None) -> str:
        """The name of the adaptation that calls use which choose none.

        Raises:
            GraftError: GC091 where there is no such bank.
        """
        found = _bank(self._compilation.spec, bank)
        return found.members[int(self._compilation.store.get(adapter_name("", str(found.name), ACTIVE)))]

    def train_only(self, *names: str) -> None:
        """Let only these adaptations train from now on, all of them where none is named.

        The tensors of the others want no gradient then, so that no optimiser moves them, by weight decay neither.

        Args:
            names: adaptations or compositions.

        Raises:
            GraftError: GC091 where there is no such adaptation.
        """
        known = [*self._compilation.spec.owners, TRAIN]
        for name in names:
            if name not in known:
                raise unknown_name("adaptation", name, known)
        for fqn, tensor in self._trainable.items():
            tensor.requires_grad_(not names or owner_of(fqn) in names)

    @cached_property
    def _trainable(self) -> dict[str, Tensor]:
        """What trains if everything does."""
        return {fqn: tensor for fqn, tensor in self._compilation.store.adapters() if tensor.requires_grad}

    @in_every_process
    def fix(self, choice: Choice, bank: str | None = None) -> Compiled:
        """A compiled model in which a bank is one adaptation for good, with no axis of slots: it folds and exports as
        any other. This model stays as it is, and shares no adapter tensor with it.

        Args:
            choice: an adaptation's name, the number of its slot, or a factor for each adaptation that takes part: their
                tensors are added up.
            bank: the bank's name, where there are several.

        Raises:
            GraftError: GC038 where there is no such slot, GC091 where there is no such bank.
        """
        compilation = self._compilation
        found = _bank(compilation.spec, bank)
        factors = dict(choice) if isinstance(choice, Mapping) else {found.members[slot_of(found, choice)]: 1.0}
        for name in factors:
            slot_of(found, name)
        if not factors:
            raise GraftError("GC038", f"nothing is chosen from {found.name!r}")
        name = next(iter(factors)) if len(factors) == 1 else str(found.name)
        spec = _without(compilation.spec, found, next(iter(factors)), name)
        return self.sibling(spec, _values(compilation, found, factors, name))


def _bank(spec: Spec, name: str | None) -> CompositionSpec:
    banks = {str(c.name): c for c in spec.compose if isinstance(c, Bank)}
    if name is None and len(banks) == 1:
        return next(iter(banks.values()))
    if name is None:
        raise GraftError("GC091", "which bank?", hint=f"there is: {', '.join(banks) or 'none'}")
    if name not in banks:
        raise unknown_name("bank", name, banks)
    return banks[name]


def _without(spec: Spec, bank: CompositionSpec, like: str, name: str) -> Spec:
    """The spec with one adaptation called ``name`` in the place of a bank."""
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
    """The adapter tensors with those of the bank added up under one name."""
    found: dict[str, Tensor] = {}
    terms: dict[str, list[Tensor]] = {}
    for fqn, tensor in adapter_values(compilation.store):
        owner = owner_of(fqn)
        own = renamed(fqn, name)
        if owner == bank.name:
            found |= {} if fqn.endswith(f".{ACTIVE}") else {own: tensor}
        elif owner in factors:
            terms.setdefault(own, []).append(tensor if factors[owner] == 1 else tensor * factors[owner])
        elif owner not in bank.members:
            found[fqn] = tensor
    return found | {own: each[0] if len(each) == 1 else torch.stack(each).sum(0) for own, each in terms.items()}
