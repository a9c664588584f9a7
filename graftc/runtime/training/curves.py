"""Read training logs as curves, from `TrainingLog` files or the Trainer's ``trainer_state.json``, without torch."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from graftc.specs.errors.arguments import as_path
from graftc.specs.errors.calls import public
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.errors.text import quoted, some
from graftc.specs.strict_json import read_json

LINE_BYTES = 2**24
STATE_BYTES = 2**28
MOST_POINTS = 1000
MOST_CURVES = 10_000
MOST_RESUMES = 1000
_NO_CURVES = frozenset({"step", "time", "figures", "epoch"})


class Curve(TypedDict):
    """One quantity over the optimiser steps of a training run."""

    name: str
    """``loss``, or the site to which the quantity belongs."""

    group: str
    """``training``, ``evaluation``, or the adaptation and its figure: ``adalora: rank``."""

    steps: list[int]
    """The steps in ascending order, including the last step before a previously constant value changes."""

    values: list[float]
    """One value for each step."""


@public("graftc.read_log")
def read_log(path: str | os.PathLike[str], *, points: int = MOST_POINTS) -> list[Curve]:
    """Return the curves of a training log, in the order in which their names first appear.

    If training was resumed from an earlier step, later entries replace the log's entries for that step and all
    following steps. Long curves are thinned by dropping every second point, but keep the last one. Lines that cannot be
    interpreted are left out with a warning (GC124); an incomplete last line is left out without one.

    Args:
        path: a file written by `TrainingLog`, or the transformers Trainer's ``trainer_state.json``.
        points: the maximum number of points per curve, at least 2.

    Raises:
        GraftError: GC123 if there is no such file, or if it contains no lines of a training log; GC073 for arguments of
            the wrong type.
    """
    given: Any = points
    if isinstance(given, bool) or not isinstance(given, int) or given < 2:
        raise GraftError("GC073", f"points is {points!r:.40}", hint="pass an integer of at least 2")
    file = as_path(path)
    read = _Reader(points)
    if file.exists() and not file.is_file():  # a pipe may never end
        raise _no_log(file, "is not a regular file")
    try:
        entries = _state_entries(file)
        if entries is None:
            _read_lines(file, read)
        else:
            for number, entry in enumerate(entries, 1):
                read.take(number, entry)
    except OSError as error:
        raise _no_log(file, f"cannot be read: {(error.strerror or str(error)).lower()}") from error
    if not read.entries:
        raise _no_log(file, "contains no lines of a training log")
    if read.ignored:
        where = "entries" if entries is not None else "lines"
        numbers = some([str(number) for number in read.ignored], 5)
        more = f" and {read.ignored_count - len(read.ignored):,} more" if read.ignored_count > len(read.ignored) else ""
        warn("GC124", f"{quoted(file)}: {where} that cannot be interpreted are left out: {numbers}{more}")
    return read.curves()


def last_step(path: Path) -> int | None:
    """Return the step of the last readable line within the last 16 MiB of a log; None if there is no such line."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - LINE_BYTES))
            lines = file.read(min(size, LINE_BYTES)).split(b"\n")
    except OSError:
        return None
    steps = (_step_of(_parsed(line)) for line in reversed(lines) if line.strip())
    return next((step for step in steps if step is not None), None)


def _no_log(path: Path, what: str) -> GraftError:
    return GraftError("GC123", f"{quoted(path)} {what}")


def _parsed(line: bytes) -> Any:
    try:
        return read_json(line, LINE_BYTES)
    except ValueError:
        return None


def _step_of(entry: Any) -> int | None:
    step = entry.get("step") if isinstance(entry, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53 else None


def _state_entries(path: Path) -> list[Any] | None:
    """Return the entries of a Trainer's state; None for any other file, such as a log of lines."""
    with path.open("rb") as file:
        if _step_of(_parsed(file.readline(LINE_BYTES))) is not None:
            return None
        size = file.seek(0, os.SEEK_END)
        if size > STATE_BYTES:
            return None
        file.seek(0)
        try:  # transformers writes NaN and Infinity as Python does; they become gaps in curves
            data = json.loads(file.read(size), parse_constant=lambda _: None, parse_int=_whole)
        except (ValueError, RecursionError):
            return None
    history = data.get("log_history") if isinstance(data, dict) else None
    return history if isinstance(history, list) else None


def _whole(text: str) -> int | None:
    """Return a log's integer; None for 20 characters or more, which no step count reaches."""
    return int(text) if len(text) < 20 else None


def _lines(path: Path) -> Iterator[tuple[bytes, bool]]:
    """Yield each line, and whether it is complete; lines that are too long are replaced by empty ones."""
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES):
            if line.endswith(b"\n"):
                yield line, True
                continue
            rest = line
            while len(rest) == LINE_BYTES and not rest.endswith(b"\n"):
                rest = file.readline(LINE_BYTES)
            yield (b"", True) if rest is not line else (line, False)


def _read_lines(path: Path, read: _Reader) -> None:
    for number, (line, complete) in enumerate(_lines(path), 1):
        if line.strip() or not line:
            entry = _parsed(line)
            if entry is not None or complete:
                read.take(number, entry)


class _Reader:
    """Collects the points of a log's entries, in log order."""

    def __init__(self, points: int) -> None:
        self._points = points
        self._series: dict[tuple[str, str], _Series] = {}
        self._step = self._before = -1
        self._resumes = 0
        self.entries = 0
        self.ignored: list[int] = []
        self.ignored_count = 0

    def take(self, number: int, entry: Any) -> None:
        """Add the entry with a given line or entry number."""
        step = _step_of(entry)
        numbers = None if step is None else _numbers(entry)
        if step is None or numbers is None or not self._follows(step):
            self._ignore(number)
            return
        self.entries += 1
        for (group, name, lasts), value in numbers.items():
            if (group, name) not in self._series and len(self._series) >= MOST_CURVES:
                self._ignore(number)
                break
            self._series.setdefault((group, name), _Series(self._points, lasts)).add(step, value, self._before)

    def _follows(self, step: int) -> bool:
        """Remove the points that an entry for this step replaces; return False if the log has too many resumes."""
        if step > self._step:
            self._before = self._step
        elif step < self._step:
            self._resumes += 1
            if self._resumes > MOST_RESUMES:
                return False
            for series in self._series.values():
                series.cut(step)
            self._before = step - 1
        self._step = step
        return True

    def _ignore(self, number: int) -> None:
        self.ignored_count += 1
        if len(self.ignored) < 5:
            self.ignored.append(number)

    def curves(self) -> list[Curve]:
        """Return the curves; figures are extended to the last step, since lines contain only changed figures."""
        return [series.curve(name, group, self._step) for (group, name), series in self._series.items() if series.last]


def _numbers(entry: Mapping[str, Any]) -> dict[tuple[str, str, bool], float] | None:
    """Return values by group, name and whether each holds until the next one; None if this is not a log entry."""
    figures = entry.get("figures", {})
    nested = figures.values() if isinstance(figures, dict) else [None]
    if not all(isinstance(sites, dict) and all(isinstance(v, dict) for v in sites.values()) for sites in nested):
        return None
    numbers = {
        ("evaluation" if key.startswith("eval_") else "training", key, False): float(value)
        for key, value in entry.items()
        if key not in _NO_CURVES and _is_number(value)
    }
    return numbers | {
        (f"{adaptation}: {figure}", site, True): float(value)
        for adaptation, sites in figures.items()
        for site, values in sites.items()
        for figure, value in values.items()
        if _is_number(value)
    }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


class _Series:
    """The points of a curve, thinned as they arrive: whenever there are too many, every second one is dropped.

    Args:
        most: the maximum number of points.
        lasts: whether each value holds until the next one.
    """

    def __init__(self, most: int, lasts: bool) -> None:
        self._most, self._lasts = most - 1, lasts  # the last point is stored separately
        self._kept: list[tuple[int, float]] = []
        self._stride = 1
        self._seen = 0
        self.last: tuple[int, float] | None = None

    def add(self, step: int, value: float, before: int) -> None:
        """Add a point; ``before`` is the step of the previous entry."""
        if self._lasts and self.last is not None and self.last[0] < before and self.last[1] != value:
            self._put(before, self.last[1])
        self._put(step, value)

    def _put(self, step: int, value: float) -> None:
        self.last = (step, value)
        if self._kept and self._kept[-1][0] == step:
            self._kept[-1] = self.last
            return
        if self._seen % self._stride == 0:
            self._kept.append(self.last)
            if len(self._kept) > self._most:
                del self._kept[1::2]
                self._stride *= 2
        self._seen += 1

    def cut(self, step: int) -> None:
        """Remove the points at this step and all later ones."""
        while self._kept and self._kept[-1][0] >= step:
            self._kept.pop()
        if self.last is not None and self.last[0] >= step:
            self.last = self._kept[-1] if self._kept else None
            self._seen = len(self._kept) * self._stride

    def curve(self, name: str, group: str, end: int) -> Curve:
        """Return the points as a curve."""
        assert self.last is not None
        last = (end, self.last[1]) if self._lasts else self.last
        every = [*self._kept, last] if not self._kept or self._kept[-1][0] < last[0] else self._kept
        return {"name": name, "group": group, "steps": [s for s, _ in every], "values": [v for _, v in every]}
