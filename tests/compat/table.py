"""The behaviour of private names of libraries that graftc relies on: a table of names and probes on tiny examples.

A probe calls the functions of `graftc.compat` for one subject. It has to fail, in whatever way, when one of its names
is gone from the library, so it imports what it calls itself.
"""

from __future__ import annotations

from collections.abc import Callable

Probe = Callable[[], None]
PROBES: dict[str, Probe] = {}
"""The probe of each private name. ``f('text')`` stands for a text in the code of a function, or in a text."""


def covers(*names: str) -> Callable[[Probe], Probe]:
    """Return a decorator that enters a probe of these names into the table."""

    def register(probe: Probe) -> Probe:
        PROBES.update(dict.fromkeys(names, probe))
        return probe

    return register
