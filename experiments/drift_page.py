"""The section of the page about what other versions of transformers and PEFT change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from experiments.cells import SHOWN, Cell
from experiments.drift_plan import METHODS, TASK, cell_in, compared, environments, trained
from experiments.environments import HIDDEN
from experiments.explaining import named
from experiments.store import FOLDER, Record, Store
from experiments.training_page import TITLES
from experiments.training_plans import MANY, STEPS

_FIGURES = ("PEFT's last loss", "loss difference", "accuracy", "graftc's last loss")
_HEAD = f"""The same cells were computed with two sets of versions: {{environments}}. All other packages have the same
versions, unless these require others; the optional {" and ".join(HIDDEN)} are hidden from both. *PEFT's last loss* and
*loss difference* (the largest relative difference between graftc's losses and PEFT's) are those of the parity table on
MiniLM in float32; *accuracy* and *graftc's last loss* are those of {STEPS} steps on {MANY:,} texts of {TITLES[TASK]} at
one rate, as in the tables of training. A figure of the newest is **bold** if it differs in any bit.

The versions that computed a cell are those under `settings.environment` in its line: a process of their own computes
it, which refuses other versions. The line's `versions` are those of the process that started that one, so they are the
same for both sets.
"""

_NOTES: Mapping[str, str] = {
    "VeRA": "**VeRA.** PEFT 0.18 ignores the projections in a folder that it loads, and trains with those that it has "
    "drawn itself. With the file's projections put in by hand, it agrees with graftc as the newest does.",
}
"""Why a row differs, by its name; each was checked by removing the cause."""

Pair = Mapping[str, Record]
"""The records of the same cell by the environment that computed it."""


def section(folder: Path = FOLDER) -> Iterator[str]:
    """Yield the section."""
    store = Store("drift", folder)
    ages = _environments(store)
    yield "## Drift\n"
    shown = (f"{age} ({', '.join(f'{n} {v}' for n, v in own.items())})" for age, own in ages.items())
    yield _HEAD.format(environments=" and ".join(shown))
    rows = {name: tuple(_pair(store, own, ages) for own in pair) for name, pair in _cells().items()}
    complete = {name: pairs for name, pairs in rows.items() if all(len(pair) == len(ages) for pair in pairs)}
    if complete:
        names = [name for figure in _FIGURES for name in (f"{figure}, oldest", "newest")]
        yield f"| {' | '.join(('method', *names, 'cells'))} |"
        yield f"| --- |{' ---: |' * len(names)} --- |"
        yield from (_line(name, *pairs) for name, pairs in complete.items())
        yield ""
        yield from (f"{_NOTES[name]}\n" for name in complete if name in _NOTES)
    if missing := len(rows) - len(complete):
        yield f"{missing} of {len(rows)} rows have not been computed yet.\n"
    yield "```\npython -m experiments drift\n```\n"


def _cells() -> dict[str, tuple[Cell, Cell]]:
    return dict(zip(METHODS, zip(compared(), trained(), strict=True), strict=True))


def _environments(store: Store) -> dict[str, dict[str, str]]:
    """Return the versions of each environment. The newest are those that the last stored cell was computed with."""
    ages = environments()
    for record in store.records().values():
        if "/newest/" in record.cell.name:
            versions = record.cell.settings["environment"]
            ages["newest"] = {name: versions[name] for name in ages["oldest"]}
    return ages


def _pair(store: Store, own: Cell, ages: Mapping[str, Mapping[str, str]]) -> Pair:
    records = {age: store.record(cell_in(own, age, versions)) for age, versions in ages.items()}
    return {age: record for age, record in records.items() if record is not None}


def _line(name: str, peft: Pair, training: Pair) -> str:
    shown = [
        *_both(peft, "end", ".6f"),
        *_both(peft, "losses", ".1e"),
        *_both(training, "test", ".1%"),
        *_both(training, "loss", ".6f"),
    ]
    digests = " ".join(f"`{record.digest[:SHOWN]}`" for pair in (peft, training) for record in pair.values())
    return f"| {named(name)} | {' | '.join(shown)} | {digests} |"


def _both(pair: Pair, figure: str, form: str) -> Iterator[str]:
    """Yield a figure in both environments; the second one in bold if it differs."""
    first, second = (record.figures[figure] for record in pair.values())
    yield f"{first:{form}}"
    yield f"{second:{form}}" if first == second else f"**{second:{form}}**"
