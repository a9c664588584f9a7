"""The buffers that a live model's Python reads and writes between graphs.

The source's are never written to. What is written to becomes the Store's own, as where a graph updates a buffer; what
is put in the place of a buffer, such as the frequencies of a text longer than any before it, stays with the live model,
as the attributes do that say so.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.live.own_state import copies, version
from graftc.passes.core.weights.store import Store


@dataclass(frozen=True)
class _Place:
    """Where a buffer is in the live model."""

    name: str
    module: nn.Module
    last: str


@dataclass(frozen=True)
class _Copied:
    """A copy, with what it is of, and how often each had been written to."""

    source: Tensor
    source_version: int
    own: Tensor
    own_version: int


class OwnBuffers:
    """Copies of the buffers between graphs, in a live model.

    Args:
        modules: the live model's between graphs, by path.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._places = [
            _Place(f"{path}.{last}" if path else last, module, last)
            for path, module in modules
            for last, buffer in module._buffers.items()
            if buffer is not None
        ]
        self._copied: dict[str, _Copied] = {}
        self._lock = threading.Lock()

    def bind(self, store: Store) -> None:
        """Let the modules have the Store's own tensors, and copies of others; anew where the Store has another value.

        Args:
            store: its tensors may have moved and changed.
        """
        with self._lock:
            stale: list[tuple[_Place, Tensor]] = []
            for place in self._places:
                tensor = store.get(place.name)
                copied = self._copied.get(place.name)
                if store.canonical(place.name) in store.updated:
                    place.module._buffers[place.last] = tensor
                elif copied is None or copied.source is not tensor or copied.source_version != version(tensor):
                    stale.append((place, tensor))
            for (place, tensor), own in zip(stale, copies([tensor for _, tensor in stale]), strict=True):
                self._copied[place.name] = _Copied(tensor, version(tensor), own, version(own))
                place.module._buffers[place.last] = own

    def keep(self, store: Store) -> None:
        """Give the Store what a call has written to.

        Args:
            store: as in `bind`.

        Raises:
            GraftError: GC030 for a buffer that shares memory with another one.
        """
        for place in self._places:
            copied, now = self._copied.get(place.name), place.module._buffers.get(place.last)
            if copied is None or now is not copied.own or version(now) == copied.own_version:
                continue
            with exclusive():
                store.own(place.name, now)
