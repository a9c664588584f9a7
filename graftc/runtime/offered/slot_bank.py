"""A bank whose adapters come and go while the model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from graftc.runtime.interop.factors import Source, read_factors, slot_values
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.offered.state_dicts import StateDicts
from graftc.runtime.slot_tensors import Values
from graftc.runtime.slots import WAIT, Slots
from graftc.specs.compose import Bank
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.diagnostics import GraftError


class SlotBank:
    """The slots of a bank: adapters are added, evicted, replaced and renamed while other threads run the model.

    Nothing is captured, compiled or stacked again. A call that runs during a change sees an adapter as it was before or
    as it is after the change. Adapters are checked before anything is written; a change that fails changes nothing.

    Args:
        runner: the Runner of the model.
        bank: a bank of its spec.

    Raises:
        GraftError: GC190 if the spec gives the bank no ``slots``.
    """

    def __init__(self, runner: AdaptedRunner, bank: Bank) -> None:
        slots = Slots.of(bank, runner.compilation.store)
        if slots is None:
            hint = f"give it a number of empty slots in the spec: {{bank: [{', '.join(bank.bank)}], slots: 8}}"
            raise GraftError("GC190", f"no adapter can be added to the bank {bank.name!r}", hint=hint)
        self.runner, self.slots, self._bank = runner, slots, bank

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the adapters in its slots, in the order of the slots."""
        return tuple(name for name in self.slots.names if name is not None)

    @property
    def capacity(self) -> int:
        """The number of its slots, empty ones included."""
        return self._bank.size

    def add(self, name: str, source: Source, *, scale: float | None = None) -> None:
        """Put an adapter in an empty slot.

        Args:
            name: its name, unique in the bank: 1 to 128 bytes of printable text.
            source: a folder that PEFT wrote; an artifact with one LoRA; or a mapping of tensors as returned by
                `adapter_state_dict` of a model with one LoRA, or by `tensors`. Ranks below the slots' are padded, and
                modules that it does not adapt stay as in the base.
            scale: the factor of ``B A`` for a mapping of tensors; by default the bank's own, ``alpha / rank``. Folders
                state theirs, and are refused with this.

        Raises:
            GraftError: GC002 for a name that a slot cannot have, GC005 for one that is taken, GC073 for a scale of a
                folder, GC190 if no slot is empty, GC191 for an adapter that does not fit; others as
                `graftc.import_peft` and `graftc.load` for folders that cannot be read.
        """
        self.slots.add(name, self._values(source, scale))

    def replace(self, name: str, source: Source, *, scale: float | None = None, wait: float = WAIT) -> None:
        """Put another adapter in the place of one, under its name.

        Calls that use the earlier adapter continue with it. If there are such calls, the new one goes to an empty slot;
        if there is none, or for the active adapter, it is written when they have ended.

        Args:
            name: the name of an adapter in a slot.
            source, scale: as for `add`.
            wait: the number of seconds to wait for calls to end.

        Raises:
            GraftError: as for `add`; GC038 if no slot contains an adapter with this name.
        """
        self.slots.number(name)
        self.slots.replace(name, self._values(source, scale), wait)

    def evict(self, name: str) -> None:
        """Take an adapter out of its slot. Calls that use it continue with it, and the slot is empty when they end.

        Raises:
            GraftError: GC038 if no slot contains an adapter with this name, GC190 for the active adapter.
        """
        self.slots.evict(name)

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name. Calls that use it are not affected.

        Raises:
            GraftError: GC038 if no slot contains an adapter with this name, GC002 and GC005 for the new name.
        """
        self.slots.rename(old, new)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return a copy of an adapter's tensors by name, as `add` accepts them.

        Raises:
            GraftError: GC038 if no slot contains an adapter with this name.
        """
        with self.slots.use([name]) as (slot,):
            return self.slots.read(slot)

    @contextmanager
    def use(self, *names: str, wait: float = WAIT) -> Iterator[Tensor]:
        """Run the block while adapters stay in their slots: neither evicted nor replaced by others.

        Calls that choose adapters by name do so themselves. Use this around code of `torch.compile`, and for choices
        that are on another device than the CPU.

        Args:
            names: one name for each row of the batch, or one for all rows.
            wait: the number of seconds to wait for an adapter that is being written.

        Yields:
            The numbers of the slots, ``int64[names]``, on the model's device: pass them as ``adapter_ids``.

        Raises:
            GraftError: GC038 if no slot contains an adapter with one of these names.
        """
        with self.slots.use(names, wait=wait) as numbers:
            yield self.rows(numbers)

    def rows(self, numbers: list[int]) -> Tensor:
        """Return numbers of slots as a tensor on the model's device, ``int64[numbers]``."""
        return torch.tensor(numbers, dtype=torch.int64, device=self.runner.device)

    def loader(self, source: Callable[[str], Source]) -> Callable[[str], Values]:
        """Return a function that reads and checks an adapter by name, given one that returns its source."""
        return lambda name: self._values(source(name), None)

    def _values(self, source: Source, scale: float | None) -> Values:
        if scale is not None and not isinstance(source, Mapping):
            message = f"scale applies to tensors, but {as_path(source)} states its own"
            raise GraftError("GC073", message, hint="leave it out, or pass the adapter's tensors")
        compilation = self.runner.compilation
        states = StateDicts(self.runner)
        factors = read_factors(
            source, compilation.source, lambda full: compilation.identity(full=True) if full else states.identity()
        )
        return slot_values(compilation, self._bank, factors, scale)
