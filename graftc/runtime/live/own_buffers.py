"""The buffers that a live model's Python reads and writes between graphs.

The source's buffers are never written to. If a buffer is written to, or replaced by another tensor of the same shape,
the Store gets a buffer of its own, as it does when a graph updates the buffer. A replacement of another shape, such as
the frequencies for a text longer than any before it, stays with the live model, like the attributes that describe it.
Calls to the base alone see the source's values.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from graftc.compat.modules import buffers_of
from graftc.compat.tensors import version_of
from graftc.compiler.capture.isolation import exclusive
from graftc.compiler.live.own_state import copies
from graftc.passes.core.weights.store import Store


@dataclass(frozen=True)
class _Place:
    """The place of a buffer in the live model."""

    name: str
    module: nn.Module
    last: str


@dataclass(frozen=True)
class _Copied:
    """A copy of a tensor, together with the tensor and the version of each at the time of copying."""

    source: Tensor
    source_version: int
    own: Tensor
    own_version: int

    def holds(self, source: Tensor) -> bool:
        """Return whether the copy still has the tensor's value."""
        same = self.source is source and self.source_version == version_of(source)
        return same and self.own_version == version_of(self.own)


class OwnBuffers:
    """Copies of the buffers that a live model's Python uses between graphs.

    Args:
        modules: the live model's modules between graphs, with their paths.
    """

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        self._places = [
            _Place(f"{path}.{last}" if path else last, module, last)
            for path, module in modules
            for last, buffer in buffers_of(module).items()
            if buffer is not None
        ]
        self._copied: dict[str, _Copied] = {}
        self._of_base: dict[str, _Copied] = {}
        self._other: dict[str, Tensor] = {}
        self._bound: dict[str, tuple[Tensor, int]] = {}
        self._lock = threading.Lock()

    def bind(self, store: Store, *, base: bool) -> None:
        """Set the modules' buffers to the Store's own tensors and to copies of the others, renewing outdated copies.

        Args:
            store: the Store, whose tensors may have moved or changed.
            base: whether the base alone is called, which uses the source's values and keeps no others.
        """
        known = self._of_base if base else self._copied
        with self._lock:
            self._bound.clear()
            stale: list[tuple[_Place, Tensor]] = []
            for place in self._places:
                name = store.canonical(place.name)
                if name in store.updated and not base:
                    self._put(place, store.get(place.name))
                    continue
                tensor = store.get(store.updated.get(name, place.name))
                if (copied := known.get(place.name)) is None or not copied.holds(tensor):
                    stale.append((place, tensor))
                else:
                    self._put(place, copied.own if base else self._other.get(place.name, copied.own))
            for (place, tensor), own in zip(stale, copies([tensor for _, tensor in stale]), strict=True):
                known[place.name] = _Copied(tensor, version_of(tensor), own, version_of(own))
                self._put(place, own)
                if not base:
                    self._other.pop(place.name, None)

    def _put(self, place: _Place, value: Tensor) -> None:
        buffers_of(place.module)[place.last] = value
        self._bound[place.name] = value, version_of(value)

    def keep(self, store: Store) -> None:
        """Pass the buffers that a call has written to or replaced to the Store.

        Args:
            store: as for `bind`.

        Raises:
            GraftError: GC030 for a buffer that shares memory with another one.
        """
        with self._lock:
            changed = list(self._changed(store))
        for place, now, owned in changed:
            with exclusive():
                if owned:
                    store.replace(place.name, now.detach().clone())
                else:
                    store.own(place.name, now)

    def _changed(self, store: Store) -> Iterator[tuple[_Place, Tensor, bool]]:
        """Yield the buffers that have been written to or replaced, each with its value and whether the Store owns it.

        Values with another shape or dtype are stored in this object instead.
        """
        for place in self._places:
            (bound, count), now = self._bound[place.name], buffers_of(place.module).get(place.last)
            owned = store.canonical(place.name) in store.updated
            if now is None or (now is bound and (owned or version_of(now) == count)):
                continue
            if now.shape != bound.shape or now.dtype != bound.dtype:
                self._other[place.name] = now
                continue
            yield place, now, owned
