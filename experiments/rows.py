"""Rows of the tables of training: the cells of a method at its best rate, with intervals over seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scipy import stats

from experiments.cells import SHOWN, canonical
from experiments.store import FOLDER, Record, Store, whole_lines
from experiments.training_plans import Repeated, Row, swept

CONFIDENCE = 0.95


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

    @property
    def is_above_zero(self) -> bool:
        """Whether the whole interval is above zero."""
        return self.mean - self.half > 0

    @property
    def is_below_zero(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.mean + self.half < 0


@dataclass(frozen=True)
class Trained:
    """A row with its cells.

    Attributes:
        row: the row.
        records: the cells at the best rate, by seed.
        times: the times of these cells, in the same order.
        is_at_the_end: whether the best rate is the lowest or the highest of its sweep.
        planned: the number of seeds that are planned.
    """

    row: Row
    records: Sequence[Record]
    times: Sequence[Mapping[str, Any]]
    is_at_the_end: bool
    planned: int

    @property
    def is_complete(self) -> bool:
        """Whether all planned seeds are there."""
        return len(self.records) == self.planned

    def values(self, figure: str) -> list[float]:
        """Return a figure of every cell that has it."""
        return [record.figures[figure] for record in self.records if record.figures.get(figure) is not None]

    def interval(self, figure: str = "test") -> Interval:
        """Return the interval of a figure."""
        return Interval.of(self.values(figure))

    def over(self, other: Trained, figure: str = "test") -> Interval:
        """Return the interval of the differences from another row in the cells of the same seeds."""
        theirs = {record.cell.seed: record.figures[figure] for record in other.records}
        return Interval.of([r.figures[figure] - theirs[r.cell.seed] for r in self.records if r.cell.seed in theirs])

    def time(self, name: str) -> float | None:
        """Return the median of a time over the cells; None if it was not measured."""
        values = [times[name] for times in self.times if times.get(name) is not None]
        return statistics.median(values) if values else None


class Table:
    """The rows of a setting that have been trained, in the order of the plan.

    Args:
        setting: what the cells have in common.
        rows: the rows, and for each whether it is trained with all seeds.
        folder: where the cells are stored.
    """

    def __init__(self, setting: Repeated, rows: Mapping[Row, bool], folder: Path = FOLDER) -> None:
        store = Store(setting.part, folder)
        records = {canonical(record.cell.to_json()): record for record in store.records().values()}
        lines = map(json.loads, whole_lines(store.times))
        self._times = {line["digest"]: line for line in lines}
        self._records = records
        self.setting, self.planned = setting, len(rows)
        trained = (self._trained(row, repeated) for row, repeated in rows.items())
        self.rows = {own.row.name: own for own in trained if own is not None}

    def _figures(self, cell: Any) -> Mapping[str, Any] | None:
        record = self._records.get(canonical(cell.to_json()))
        return None if record is None else record.figures

    def _trained(self, row: Row, repeated: bool) -> Trained | None:
        seeds = self.setting.seeds if repeated else self.setting.seeds[:1]
        at: Callable[[float], Any] = lambda rate: self.setting.cell(row, rate, seeds[0])  # noqa: E731
        best: float | None = 0.0
        is_at_the_end = False
        if row.fields is not None:
            cells, best = swept(at, row.middle, self._figures)
            is_at_the_end = best in (cells[0].rate, cells[-1].rate)
        if best is None:
            return None
        keys = [canonical(self.setting.cell(row, best, seed).to_json()) for seed in seeds]
        records = [self._records[key] for key in keys if key in self._records]
        if not records:
            return None
        return Trained(row, records, [self._times.get(r.digest, {}) for r in records], is_at_the_end, len(seeds))

    def sweep(self, row: Row) -> Iterator[tuple[float, Mapping[str, Any]]]:
        """Yield the rates of a row's sweep with the figures of their cells."""
        cells, _ = swept(lambda rate: self.setting.cell(row, rate, self.setting.seeds[0]), row.middle, self._figures)
        for cell in cells:
            figures = self._figures(cell)
            if figures is not None:
                yield cell.rate, figures

    def best(self) -> Trained | None:
        """Return the repeated row with the highest mean, once all its seeds are there; None if there is none."""
        complete = [own for own in self.rows.values() if own.is_complete and own.planned > 1]
        return max(complete, key=lambda own: own.interval().mean, default=None)

    def as_good(self, best: Trained) -> list[Trained]:
        """Return the other complete rows whose difference from the best one is not distinguishable from zero."""
        others = [own for own in self.rows.values() if own is not best and own.is_complete and own.planned > 1]
        return [own for own in others if not best.over(own).is_above_zero]


def digests(own: Trained) -> str:
    """Return the first characters of the digests of a row's cells."""
    return " ".join(f"`{record.digest[:SHOWN]}`" for record in own.records)
