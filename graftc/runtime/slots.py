"""The slots of a bank while the model runs: which adapter each of them contains, and which calls use it.

A slot is written only while no call uses it, and a call keeps the slots that it uses until it ends. So every call sees
each adapter as a whole, before or after a change, and never waits for changes of other slots. Whatever reads all slots,
such as a save, is a reader of the Store's `Changes`, which keeps changes from beginning meanwhile.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from graftc.compiler.resolve.slots import check_slot_name, slot_count
from graftc.passes.core.weights.store import Store
from graftc.runtime.slot_tensors import SlotTensors, Values
from graftc.specs.compose import Bank, CompositionSpec
from graftc.specs.errors.diagnostics import GraftError, nearest
from graftc.specs.errors.text import quoted, some

WAIT = 30.0
"""Seconds to wait for a slot by default."""


class Slots(SlotTensors):
    """The slots of one bank over the tensors of one Store. All methods may be called from any thread.

    Args:
        bank: the bank, which has ``slots``.
        store: the Store with its tensors.

    Attributes:
        evictions: the number of adapters that made room for others.
    """

    def __init__(self, bank: Bank, store: Store) -> None:
        super().__init__(bank, store)
        self.evictions = 0
        self._uses, self._last, self._clock = [0] * bank.size, [0] * bank.size, 0
        self._coming: dict[str, int] = {}  # adapters that are read (-1) or written

    def __deepcopy__(self, memo: dict[int, Any]) -> Slots:
        return Slots(self.bank, memo.get(id(self._store), self._store))

    @staticmethod
    def of(bank: CompositionSpec, store: Store) -> Slots | None:
        """Return the slots of a composition; None if no adapter can be added to it."""
        if not isinstance(bank, Bank) or slot_count(bank) is None:
            return None
        key = f"slots of {bank.name}"
        slots: Slots = store.companions.get(key) or store.companions.setdefault(key, Slots(bank, store))
        return slots

    @property
    def _changed(self) -> threading.Condition:
        return self.changes.condition

    @property
    def _written(self) -> set[int]:
        """The slots that are being written."""
        return {slot for bank, slot in self.changes.written if bank == self.bank.name}

    def _begin(self, slot: int) -> None:
        self.changes.written.add((str(self.bank.name), slot))

    def _end(self, slot: int) -> None:
        self.changes.written.discard((str(self.bank.name), slot))

    # Names

    def activate(self, choice: object) -> None:
        """Choose the slot that calls use if they choose none; raise GC038 if there is no such slot."""
        with self._changed:
            self._until_allowed()
            self.put_active(self.number(choice))

    def number(self, choice: object) -> int:
        """Return the number of a slot.

        Args:
            choice: the name of the adapter in it, or its number.

        Raises:
            GraftError: GC038 if there is no such slot, or if it is empty.
        """
        names = self.names
        if isinstance(choice, int) and not isinstance(choice, bool) and 0 <= choice < len(names):
            if names[choice] is None and not self._uses[choice]:  # a call may use an adapter that has been evicted
                raise GraftError("GC038", f"slot {choice} of {self.bank.name!r} is empty", hint="add an adapter first")
            return choice
        if isinstance(choice, str) and choice in names:
            return names.index(choice)
        known = [name for name in names if name is not None]
        close = nearest(choice, known) if isinstance(choice, str) else []
        hint = f"did you mean {close[0]!r}?" if close else f"its adapters are: {some(known)}"
        raise GraftError("GC038", f"{self.bank.name!r} has no slot {choice!r}", hint=hint)

    def _name(self, slot: int, name: str | None) -> None:
        self.put_name(slot, name)
        self._note(slot)

    def _note(self, slot: int) -> None:
        self._clock += 1
        self._last[slot] = self._clock

    # Calls

    @contextmanager
    def use(
        self, choices: Sequence[Any], load: Callable[[str], Values] | None = None, wait: float = WAIT
    ) -> Iterator[list[int]]:
        """Run the block while the chosen adapters stay in their slots, whose numbers are yielded in the same order.

        Args:
            choices: names of adapters, or numbers of slots.
            load: a function that returns an adapter that is in no slot. It is put in an empty slot or, if there is
                none, in the place of the adapter that has been unused for longest, except the active one.
            wait: the number of seconds to wait for slots that are being written, or for slots to become unused.

        Raises:
            GraftError: GC038 for an adapter that is in no slot, without ``load``; GC190 if no slot becomes available in
                time, or there are too few; anything that ``load`` raises.
        """
        numbers = self.take(choices, load, wait)
        try:
            yield numbers
        finally:
            self.release(numbers)

    def take(
        self, choices: Sequence[Any], load: Callable[[str], Values] | None = None, wait: float = WAIT
    ) -> list[int]:
        """Begin a use, which `release` ends; see `use`.

        Adapters are read before room is made for them, so that one that cannot be read drives out no other. Slots are
        kept for all choices at once, so that no two uses wait for each other.
        """
        until, mine = time.monotonic() + wait, dict[str, Values]()
        if odd := [choice for choice in choices if not isinstance(choice, str | int)]:
            self.number(odd[0])  # raises
        try:
            while True:
                with self._changed:
                    while (taken := self._taken(choices, mine, load is not None)) is None:
                        self._wait(until)
                numbers, unread = taken
                if not unread:
                    break
                for name in unread:
                    assert load is not None
                    mine[name] = load(name)
            try:
                for name in [name for name in mine if self._coming[name] >= 0]:
                    self._fill(name, mine.pop(name))
            except BaseException:
                self._give_up(mine)
                self.release(numbers)
                raise
        finally:
            self._give_up(mine)
        return numbers

    def _give_up(self, mine: dict[str, Values]) -> None:
        with self._changed:
            while mine:
                self._forget(mine.popitem()[0])

    def _taken(
        self, choices: Sequence[Any], mine: dict[str, Values], may_load: bool
    ) -> tuple[list[int], list[str]] | None:
        """Keep the slots of all choices, and find slots for the adapters that are in none but have been read.

        Returns:
            The number of each choice's slot; or instead the adapters that have to be read first, which are entered in
            ``mine`` so that no other use reads them; or None to wait, with nothing kept.
        """
        names, wanted = self.names, dict.fromkeys(choices)
        if any(c in self._coming and c not in mine for c in wanted):
            return None
        absent = [check_slot_name(c) for c in wanted if isinstance(c, str) and c not in names] if may_load else []
        found = {c: self.number(c) for c in wanted if c not in absent}
        room = self._room(len(absent), found.values())
        if unread := [name for name in absent if name not in mine]:
            mine |= {name: {} for name in unread}
            self._coming |= dict.fromkeys(unread, -1)
            return [], unread
        if room is None or not self._written.isdisjoint(found.values()) or (absent and self.changes.refused):
            return None
        for name, slot in zip(absent, room, strict=True):
            self._coming[name] = found[name] = slot
            self._begin(slot)
            if names[slot] is not None:
                self.evictions += 1
                self._name(slot, None)
        for slot in {*found.values()}:
            self._uses[slot] += 1
            self._note(slot)
        return [found[c] for c in choices], []

    def _room(self, count: int, kept: Collection[int]) -> list[int] | None:
        """Return slots for a number of adapters: empty ones, then those unused for longest; None if there are too few.

        Raises:
            GraftError: GC190 if waiting does not help.
        """
        names, active = self.names, self.active
        able = [slot for slot in range(self.bank.size) if slot != active and slot not in kept]
        if len(able) < count:
            message = f"{self.bank.name!r} has too few slots ({self.bank.size}) for the adapters of this call"
            raise GraftError("GC190", message, hint="choose fewer adapters at once, or give the bank more slots")
        free = [slot for slot in able if not self._uses[slot] and slot not in self._written]
        free.sort(key=lambda slot: (names[slot] is not None, self._last[slot]))
        return free[:count] if len(free) >= count else None

    def release(self, numbers: Collection[int]) -> None:
        """End a use; slots whose adapter has been evicted meanwhile become empty."""
        with self._changed:
            for slot in set(numbers):
                self._uses[slot] -= 1
                self.changes.later(partial(self._empty_unused, slot))
            self._changed.notify_all()

    def _empty_unused(self, slot: int) -> None:
        if self.names[slot] is None and not self._uses[slot] and slot not in self._written:
            self.write(slot, {})

    def _wait(self, until: float) -> None:
        """Wait for a change; raise GC190 if it is too late."""
        if self.changes.refused:  # readers end by themselves
            self._changed.wait()
            return
        left = until - time.monotonic()
        if left <= 0 or not self._changed.wait(left):
            used = [name for name, uses in zip(self.names, self._uses, strict=True) if uses and name is not None]
            message = f"no slot of {self.bank.name!r} became available in time"
            raise GraftError("GC190", message, hint=f"in use are: {some(used) or 'none'}")

    # Changes

    def add(self, name: str, values: Values) -> None:
        """Put an adapter in an empty slot.

        Raises:
            GraftError: GC002 for a name that a slot cannot have, GC005 for one that is taken, GC190 if no slot is
                empty. In all cases, nothing has changed.
        """
        with self._changed:
            self._until_allowed()
            self._require_new(name)
            slot = self._empty()
            if slot is None:
                hint = "evict an adapter, or give the bank more slots"
                raise GraftError("GC190", f"{self.bank.name!r} has no empty slot", hint=hint)
            self._coming[name] = slot
            self._begin(slot)
        self._fill(name, values)

    def _fill(self, name: str, values: Values) -> None:
        """Write an adapter to the slot that was found for it; the slot stays empty if that fails."""
        slot, done = self._coming[name], False
        try:
            self.write(slot, values)
            done = True
        finally:
            with self._changed:
                if done:
                    self._name(slot, name)
                else:
                    self.write(slot, {})
                self._forget(name)

    def _forget(self, name: str) -> None:
        self._end(self._coming.pop(name))
        self._changed.notify_all()

    def _empty(self) -> int | None:
        """Return the number of an empty slot that no call uses; None if there is none."""
        names = self.names
        every = range(self.bank.size)
        return next((s for s in every if names[s] is None and not self._uses[s] and s not in self._written), None)

    def _require_new(self, name: str) -> None:
        if check_slot_name(name) in self.names or name in self._coming:
            hint = "pass another name, or call replace"
            raise GraftError("GC005", f"{quoted(name)} is already in {self.bank.name!r}", hint=hint)

    def _until_allowed(self) -> None:
        while self.changes.refused:
            self._changed.wait()

    def _settled(self, name: str, until: float) -> int:
        """Return the slot of an adapter, once nobody writes to it."""
        while self.changes.refused or name in self._coming or self.number(name) in self._written:
            self._wait(until)
        return self.number(name)

    def evict(self, name: str) -> None:
        """Take an adapter out of its slot. Calls that use it continue with it, and the slot is empty when they end.

        Raises:
            GraftError: GC038 for an adapter that is in no slot, GC190 for the active one.
        """
        with self._changed:
            slot = self._settled(name, time.monotonic() + WAIT)
            if slot == self.active:
                message = f"{quoted(name)} is active: calls that choose no adapter use it"
                raise GraftError("GC190", message, hint="activate another adapter first")
            self._name(slot, None)
            self._empty_unused(slot)
            self._changed.notify_all()

    def rename(self, old: str, new: str) -> None:
        """Give an adapter another name.

        Raises:
            GraftError: GC038 for an adapter that is in no slot, GC002 for a name that a slot cannot have, GC005 for one
                that is taken.
        """
        with self._changed:
            slot = self._settled(old, time.monotonic() + WAIT)
            if old != new:
                self._require_new(new)
                self._name(slot, new)

    def replace(self, name: str, values: Values, wait: float = WAIT) -> None:
        """Put another adapter in the place of one, under its name. Calls that use the earlier one continue with it.

        If calls use the slot, the adapter goes to an empty slot. If there is none, or for the active adapter, it is
        written as soon as no call uses the slot.

        Raises:
            GraftError: GC038 for an adapter that is in no slot, GC190 if the slot does not become unused within
                ``wait`` seconds. In both cases, nothing has changed.
        """
        until, done = time.monotonic() + wait, False
        with self._changed:
            while True:
                slot = target = self._settled(name, until)
                if not self._uses[slot]:
                    break
                empty = self._empty() if slot != self.active else None
                if empty is not None:
                    target = empty
                    break
                self._wait(until)
            self._begin(target)
        before = self.read(target) if target == slot else {}
        try:
            self.write(target, values)
            done = True
        finally:
            with self._changed:
                still = self.names[slot] == name
                if not (done and still):
                    self.write(target, before)
                elif target != slot:
                    self._name(target, name)
                    self._name(slot, None)
                self._end(target)
                self._empty_unused(slot)
                self._changed.notify_all()
        if not still:
            message = f"{quoted(name)} was evicted or renamed meanwhile"
            raise GraftError("GC038", message, hint="add the adapter")
