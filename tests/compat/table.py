"""The behaviour of private names of libraries that graftc relies on: a table of names and probes on tiny examples.

A probe calls the functions of `graftc.compat` for one subject. It has to fail, in whatever way, when one of its names
is gone from the library, so it imports what it calls itself.
"""

from __future__ import annotations

from collections.abc import Callable

Probe = Callable[[], None]
PROBES: dict[str, Probe] = {}
"""The probe of each private name. ``f('text')`` stands for a text in the code of a function, or in a text."""

SINCE: dict[Probe, tuple[str, str]] = {}
"""The library and release that first had what a probe looks for, if graftc supports earlier ones without it."""

UNTIL: dict[Probe, tuple[str, str]] = {}
"""The library and release that first did without what a probe looks for."""


def covers(
    *names: str, since: tuple[str, str] | None = None, until: tuple[str, str] | None = None
) -> Callable[[Probe], Probe]:
    """Return a decorator that enters a probe of these names into the table.

    Args:
        names: private names.
        since: the library and release that first had them, if graftc does without them where they are not there.
        until: the library and release that first did without them, if graftc supports that one as well.
    """

    def register(probe: Probe) -> Probe:
        PROBES.update(dict.fromkeys(names, probe))
        if since is not None:
            SINCE[probe] = since
        if until is not None:
            UNTIL[probe] = until
        return probe

    return register
