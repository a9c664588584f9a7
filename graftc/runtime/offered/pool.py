"""A pool of adapters in the slots of a bank, for servers: adapters are loaded when a request names them."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from graftc.runtime.interop.factors import Source
from graftc.runtime.model.runner import runner_of
from graftc.runtime.offered.slot_bank import SlotBank
from graftc.runtime.slots import WAIT
from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted


@dataclass(frozen=True)
class PoolCounters:
    """Counts of a pool's operations so far.

    Attributes:
        hits: how often a request named an adapter that was in a slot.
        loads: how often an adapter was read and written to a slot.
        evictions: how often an adapter made room for another one.
    """

    hits: int
    loads: int
    evictions: int


class AdapterPool:
    """Adapters by name, of which as many are in the slots of a bank as there is room for.

    An adapter that is in no slot is read and written to an empty one or, if there is none, in the place of the adapter
    that has been unused for longest. The active adapter stays. All methods may be called from any thread.

    Args:
        compiled: a compiled model with a bank that has ``slots``.
        source: a folder, whose subfolders are the adapters by name; or a function from a name to what
            `SlotBank.add` accepts. The function may be called in several threads at once.
        bank: the bank's name; needed only if there are several.
        wait: the number of seconds that a request waits for a slot.

    Raises:
        GraftError: GC091 if there is no such bank, GC190 if it has no ``slots``.
    """

    @public("graftc.AdapterPool")
    def __init__(
        self,
        compiled: Any,
        source: str | Path | Callable[[str], Source],
        *,
        bank: str | None = None,
        wait: float = WAIT,
    ) -> None:
        self.bank: SlotBank = runner_of(compiled).bank(bank)
        self.wait = wait
        self._load = self.bank.loader(source if callable(source) else _in_folder(as_path(source)))
        self._lock = threading.Lock()
        self._requested = self._loads = 0

    @property
    def counters(self) -> PoolCounters:
        """How many adapters were in a slot, were loaded and had to make room."""
        with self._lock:
            return PoolCounters(self._requested - self._loads, self._loads, self.bank.slots.evictions)

    def use(self, *names: str) -> PoolUse:
        """Return a context manager, for ``with`` and ``async with``, within which adapters are in slots.

        It yields the numbers of the slots, ``int64[names]``, to pass as ``adapter_ids``. ``async with`` waits and reads
        files in another thread, so that the event loop continues.

        Args:
            names: one name for each row of the batch, or one for all rows.

        Raises:
            GraftError: on entering, GC190 if no slot becomes available in time, GC191 for an adapter that does not fit,
                and others as `SlotBank.add`.
        """
        return PoolUse(self, names)

    def take(self, names: tuple[str, ...]) -> list[int]:
        """Put adapters in slots, and keep them there until ``self.bank.slots.release`` is called with the result."""
        numbers = self.bank.slots.take(names, self._counted, self.wait)
        with self._lock:
            self._requested += len(set(names))
        return numbers

    def _counted(self, name: str) -> Any:
        values = self._load(name)
        with self._lock:
            self._loads += 1
        return values


class PoolUse:
    """The use of some adapters of a pool by one request: a context manager, for ``with`` and ``async with``."""

    def __init__(self, pool: AdapterPool, names: tuple[str, ...]) -> None:
        self._pool, self._names = pool, names
        self._numbers: list[int] = []

    def __enter__(self) -> Tensor:
        self._numbers = self._pool.take(self._names)
        return self._pool.bank.rows(self._numbers)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._pool.bank.slots.release(self._numbers)

    async def __aenter__(self) -> Tensor:
        taking = asyncio.ensure_future(asyncio.to_thread(self.__enter__))
        try:
            return await asyncio.shield(taking)
        except asyncio.CancelledError:  # the thread goes on, and nobody will leave what it enters
            taking.add_done_callback(self._left)
            raise

    def _left(self, taking: asyncio.Future[Tensor]) -> None:
        if taking.exception() is None:
            self.__exit__(None, None, None)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, trace)


def _in_folder(folder: Path) -> Callable[[str], Path]:
    def path_of(name: str) -> Path:
        if name in (".", "..") or Path(name).name != name or not (folder / name).is_dir():
            raise GraftError("GC091", f"there is no adapter {quoted(name, 60)} in {folder}")
        return folder / name

    return path_of
