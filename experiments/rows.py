"""Rows of the tables of training: the cells of a method at its best rate, with intervals over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from experiments.cells import SHOWN
from experiments.store import FOLDER, Record, Store
from experiments.training_plans import Repeated, Row, Rows, best_cells, swept_row

CONFIDENCE = 0.95
_MOST_DIGITS = 4


@dataclass(frozen=True)
class Interval:
    """A mean, and the half width of its interval at `CONFIDENCE`; NaN where there is one value."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        """Return the interval of Student's t distribution."""
        if len(values) < 2:
            return cls(values[0], math.nan)
        error = statistics.stdev(values) / math.sqrt(len(values))
        return cls(statistics.fmean(values), error * float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)))

    def shown(self, digits: int = 1, scale: float = 1.0, sign: str = "") -> str:
        """Return the interval as text, the mean alone where there is one value.

        Args:
            digits: digits behind the point.
            scale: a factor of what is shown, such as 100 for percent.
            sign: ``+`` to show the sign of a positive mean as well.

        There are more digits where rounding would hide whether the interval contains zero.
        """
        if math.isnan(self.half):
            return _number(scale * self.mean, digits, sign)
        mean, half = (f"{scale * abs(value):.{digits}f}" for value in (self.mean, self.half))
        if mean == half and abs(self.mean) != self.half and digits < _MOST_DIGITS:
            return self.shown(digits + 1, scale, sign)
        return f"{_number(scale * self.mean, digits, sign)} ± {half}"

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.mean - self.half > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.mean + self.half < 0


def _number(value: float, digits: int, sign: str) -> str:
    """Return a number as text; one that rounds to zero has no sign."""
    shown = f"{value:{sign}.{digits}f}"
    return shown.lstrip("+-") if float(shown) == 0 else shown


@dataclass(frozen=True)
class Trained:
    """A row with its cells.

    Attributes:
        row: the row.
        records: the cells at the best rate, by seed.
        times: the times of all cells of the row, those of the sweep among them.
        is_at_the_end: whether the best rate is the lowest or the highest of its sweep.
        planned: the number of seeds that are planned.
        swept: the cells of the sweep.
    """

    row: Row
    records: Sequence[Record]
    times: Sequence[Mapping[str, Any]]
    is_at_the_end: bool
    planned: int
    swept: Sequence[Record] = ()

    @property
    def is_complete(self) -> bool:
        """Whether all planned seeds are there."""
        return len(self.records) == self.planned

    @property
    def rate(self) -> float:
        """The best rate; 0 without a method."""
        return self.records[0].cell.rate

    @property
    def trained(self) -> int:
        """The number of values that train besides the head."""
        return int(self.records[0].figures["trained"])

    def values(self, figure: str) -> list[float]:
        """Return a figure of every cell that has it."""
        return [record.figures[figure] for record in self.records if record.figures.get(figure) is not None]

    def interval(self, figure: str = "test") -> Interval:
        """Return the interval of a figure."""
        return Interval.of(self.values(figure))

    def differences(self, other: Trained, figure: str = "test") -> dict[int, float]:
        """Return the differences of a figure from another row's in the cells of the same seeds, by seed."""
        theirs = {record.cell.seed: record.figures[figure] for record in other.records}
        shared = [record for record in self.records if record.cell.seed in theirs]
        return {record.cell.seed: record.figures[figure] - theirs[record.cell.seed] for record in shared}

    def over(self, other: Trained, figure: str = "test") -> Interval:
        """Return the interval of these differences."""
        return Interval.of([*self.differences(other, figure).values()])

    @property
    def first(self) -> float:
        """The test score of the first seed, the only one that all rows have."""
        return float(self.records[0].figures["test"])

    @property
    def gap(self) -> float:
        """How much lower the validation quality of the sweep's second best rate is than that of the best."""
        qualities = sorted((record.figures["validation"] for record in self.swept), reverse=True)
        return float(qualities[0] - qualities[1])

    def spread(self, name: str) -> float:
        """Return the largest of a time over its least in the cells, which all do the same work; 1 without any."""
        values = [times[name] for times in self.times if times.get(name)]
        return max(values) / min(values) if values else 1.0

    def time(self, name: str) -> float | None:
        """Return the least of a time over the cells, which other work on the machine delays; None without one."""
        return min((times[name] for times in self.times if times.get(name) is not None), default=None)


class Table:
    """The rows of a setting that have been trained, in the order of the plan.

    Args:
        setting: the settings that all cells share.
        rows: the rows, and for each whether it is trained with all seeds.
        folder: where the cells are stored.
    """

    def __init__(self, setting: Repeated, rows: Rows, folder: Path = FOLDER) -> None:
        self._setting, self._store, self.planned = setting, Store(setting.part, folder), len(rows)
        self.repeated = sum(rows.values())
        self._times = self._store.times_of()
        trained = (self._trained(row, repeated) for row, repeated in rows.items())
        self.rows = {own.row.name: own for own in trained if own is not None}

    def _trained(self, row: Row, repeated: bool) -> Trained | None:
        cells, best = swept_row(self._setting, row, self._store.known)
        if best is None:
            return None
        planned = best_cells(self._setting, row, best, repeated)
        records = [record for record in map(self._store.record, planned) if record is not None]
        if not records:
            return None
        swept = [record for record in map(self._store.record, cells) if record is not None]
        times = [self._times.get(record.digest, {}) for record in (*records, *swept)]
        is_at_the_end = bool(cells) and best in (cells[0].rate, cells[-1].rate)
        return Trained(row, records, times, is_at_the_end, len(planned), swept)

    @property
    def task(self) -> str:
        """The task of the setting; empty without one."""
        return str(getattr(self._setting, "task", ""))

    def sweep(self, row: Row) -> Iterator[tuple[float, Mapping[str, Any]]]:
        """Yield the rates of a row's sweep with the figures of their cells."""
        for cell in swept_row(self._setting, row, self._store.known)[0]:
            figures = self._store.known(cell)
            if figures is not None:
                yield cell.rate, figures

    @property
    def complete(self) -> list[Trained]:
        """The rows with several seeds, all of which are there."""
        return [own for own in self.rows.values() if own.is_complete and own.planned > 1]

    def best(self) -> Trained | None:
        """Return the complete row with the highest mean; None if there is none."""
        return max(self.complete, key=lambda own: own.interval().mean, default=None)

    def as_good(self, best: Trained) -> list[Trained]:
        """Return the other complete rows whose difference from the best one is not distinguishable from zero."""
        return [own for own in self.complete if own is not best and not best.over(own).is_above_zero]

    def ending(self, command: str) -> Iterator[str]:
        """Yield the lines below a table: the number of rows that are missing, and the command that computes them."""
        if missing := self.planned - len(self.rows):
            yield f"{missing} of {self.planned} rows have not been computed yet.\n"
        yield f"```\npython -m experiments {command}\n```\n"


def rate_of(own: Trained) -> str:
    """Return a row's best rate as it is shown, marked if it is at the end of its sweep."""
    return f"{own.rate:g}{'*' if own.is_at_the_end else ''}" if own.rate else "-"


def digests(own: Trained) -> str:
    """Return the first characters of the digests of a row's cells."""
    return digests_of(own.records)


def digests_of(records: Iterable[Record]) -> str:
    """Return the first characters of the digests of cells."""
    return " ".join(f"`{record.digest[:SHOWN]}`" for record in records)


def listed(names: Iterable[str]) -> str:
    """Return names as text; a name with a comma is in italics, so that it can be told from two."""
    return ", ".join(f"*{name}*" if "," in name else name for name in names) or "none"
