"""The section of the page about the time that its cells took."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments.plans import parts
from experiments.store import FOLDER, Store

_HEAD = """## Time

The sum of what the stored cells took, each with one thread. They were computed two at a time on virtual machines with
two cores and no GPU, beside other work at times.
"""


def section(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the section."""
    yield _HEAD
    yield "| part | cells | hours | longest cell |"
    yield "| --- | ---: | ---: | ---: |"
    total = list[float]()
    for name in parts():
        seconds = times(name, folder)
        if seconds:
            yield f"| {name} | {len(seconds)} | {sum(seconds) / 3600:.1f} | {max(seconds) / 60:.1f} min |"
        total += seconds
    if total:
        yield f"| all | {len(total)} | {sum(total) / 3600:.1f} | {max(total) / 60:.1f} min |"
    yield ""
    yield "```\npython -m experiments page\n```\n"
    if total:
        yield f"`make results`, two cells at a time, takes about {sum(total) / 7200:.0f} hours from scratch.\n"


def times(part: str, folder: Path = FOLDER) -> list[float]:
    """Return the seconds that the stored cells of a part took."""
    store = Store(part, folder)
    own = store.times_of()
    return [float(own[digest]["seconds"]) for digest in store.records() if digest in own]
