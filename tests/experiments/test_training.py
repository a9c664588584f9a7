"""Cells that train: sweeps follow from figures, tests are kept apart from choices, and rows are summed up rightly."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import classifying, tasks
from experiments.cells import Cell, Sources
from experiments.rows import Interval, Table
from experiments.store import Record, Store
from experiments.summary_page import summary
from experiments.tasks import TABLES, TESTED, VALIDATION, task_of, texts_of
from experiments.training_page import sections, signed, size
from experiments.training_plans import (
    ALONE,
    ALONE_FIXED,
    FLOOR,
    FLOORS,
    HEAD_RATE,
    LADDER,
    MOST_RATES,
    ROWS,
    SEEDS,
    Setting,
    encoder,
    row_cells,
    setting_of,
    swept,
)

SETTING = Setting("encoder", "r52", 614)
QUICK = setting_of("encoder", "r52", 614, quick=True)


def at(rate: float) -> Cell:
    return SETTING.cell(ROWS["LoRA"], rate, 0)


def sweep(best: float, middle: float = 1e-3) -> tuple[list[float], float | None]:
    """Return the rates that a sweep visits, and the one that it chooses, if validation is highest at ``best``."""
    known: dict[float, Mapping[str, float]] = {}
    while True:
        cells, rate = swept(at, middle, lambda cell: known.get(cell.rate))
        if rate is not None:
            return [cell.rate for cell in cells], rate
        for cell in cells:
            known[cell.rate] = {"validation": -abs(math.log(cell.rate / best)), "validation_loss": 0.0}


@pytest.mark.parametrize(
    ("best", "visited"),
    [
        (1e-3, LADDER[3:6]),
        (3e-3, LADDER[3:7]),
        (1e-2, LADDER[3:8]),
        (1e-1, LADDER[3:8]),
        (1e-4, LADDER[1:6]),
    ],
)
def test_a_sweep_goes_on_while_the_best_rate_is_at_an_end(best: float, visited: tuple[float, ...]) -> None:
    rates, chosen = sweep(best)
    assert tuple(rates) == visited and len(rates) <= MOST_RATES
    assert chosen == min(visited, key=lambda rate: abs(math.log(rate / best)))


def test_equal_accuracies_are_told_apart_by_the_loss() -> None:
    losses = dict(zip(LADDER[3:6], (0.5, 0.4, 0.6), strict=True))
    _, rate = swept(at, 1e-3, lambda cell: {"validation": 0.8, "validation_loss": losses[cell.rate]})
    assert rate == LADDER[4]


def test_seeds_follow_at_the_best_rate() -> None:
    def known(cell: Cell) -> dict[str, float]:
        return {"validation": float(cell.rate == 1e-3)}

    def places(repeated: bool) -> list[tuple[float, int]]:
        return [(cell.rate, cell.seed) for cell in row_cells(SETTING, ROWS["LoRA"], known, repeated)]

    assert places(False) == [(rate, 0) for rate in LADDER[3:6]]
    assert places(True) == [*places(False), *((1e-3, seed) for seed in SEEDS[1:])]
    assert [cell.seed for cell in row_cells(SETTING, ROWS[FLOOR], known, True)] == [*SEEDS]


def test_without_figures_only_sweeps_are_planned() -> None:
    assert {cell.seed for cell in encoder().plan(lambda _: None) if ROWS[cell.name].swept and cell.name != FLOOR} == {0}


def test_a_row_that_sweeps_no_rates_has_its_rate_at_once() -> None:
    cells = [*row_cells(SETTING, ROWS[ALONE_FIXED], lambda _: None, True)]
    assert [(cell.rate, cell.seed) for cell in cells] == [(HEAD_RATE, seed) for seed in SEEDS]


@pytest.mark.parametrize("task", TABLES)
def test_texts_are_kept_apart(task: str) -> None:
    """A seed draws other texts to train on, the test texts stay, and none of either chooses the rate."""
    first, second = (task_of({"task": task, "texts": 300}, seed) for seed in (0, 1))
    assert first.test == second.test and len(first.test) == TESTED
    assert first.train != second.train and len(first.train) == 300 and len(first.validation) == VALIDATION
    for own in (first, second):
        assert not set(own.train.texts) & set(own.validation.texts)


def test_a_class_has_as_many_texts_as_asked_for() -> None:
    labels = task_of({"task": "r52", "texts": texts_of("r52", 16)}, 0).train.labels
    counts = [labels.count(label) for label in range(52)]
    assert max(counts) == 16 and min(counts) == 1 and sum(counts) == texts_of("r52", 16)


@pytest.mark.slow
@pytest.mark.sample(FLOOR, "LoRA")
@pytest.mark.parametrize("name", [FLOOR, ALONE, "LoRA", "prompt", "SpIEL", "mask", "LT-SFT"])
def test_rows_train(name: str) -> None:
    """Computing a cell twice gives the same figures; values outside the head are counted, and merges are exact."""
    row = ROWS[name]
    cell = QUICK.cell(row, 1e-3, 0).to_json()
    torch.manual_seed(5)
    first, second = classifying.figures(cell), classifying.figures(cell)
    times = first.pop("times", None), second.pop("times", None)
    assert first == second and 0 <= first["test"] <= 1
    if name == FLOOR:
        return
    assert times[0]["step_ms"] > 0 and math.isfinite(first["loss"])
    assert (first["trained"] == 0) == (name == ALONE)
    assert first["bytes"] >= 4 * first["trained"] or name in ("mask", "LT-SFT", "SpIEL")
    assert first["folded"] is None if name == "prompt" else first["folded"] <= 1e-5


@pytest.mark.full
def test_ratings_are_a_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = tuple(f"text number {number}" for number in range(900))
    split = tasks.DataSplit(texts, tuple(number / 450 - 1 for number in range(900)))  # type: ignore[arg-type]
    monkeypatch.setattr(tasks, "_splits", lambda task: (split, split, 1))
    for name in (FLOOR, "LoRA"):
        figures = classifying.figures(
            setting_of("tasks", "reviews", 64, quick=True).cell(ROWS[name], 1e-3, 0).to_json()
        )
        assert -1 <= figures["test"] <= 1 and "macro_f1" not in figures


def test_an_interval_is_students() -> None:
    """Five values with mean 3 and standard deviation 1.581; t(0.975, 4) is 2.776."""
    own = Interval.of([1.0, 2.0, 3.0, 4.0, 5.0])
    assert own.mean == 3 and math.isclose(own.half, 2.7764 * 1.5811 / math.sqrt(5), rel_tol=1e-4)
    assert own.is_above_zero and not own.is_below_zero
    assert math.isnan(Interval.of([0.5]).half) and not Interval.of([0.5]).is_above_zero
    assert [signed(Interval(-0.02, 0.01)), signed(Interval(0.01, 0.02))] == ["**-2.0 ± 1.0**", "+1.0 ± 2.0"]


def stored(folder: Path, figures: Mapping[str, Mapping[int, float]]) -> None:
    """Store the cells of rows by name, each with a test accuracy by seed; the middle rate is the best."""
    store = Store("encoder", folder)
    for name, by_seed in figures.items():
        row = ROWS[name]
        rates = [0.0] if row.fields is None else [r for r in LADDER if 0.2 < r / row.middle < 5]
        for rate in rates:
            for seed, test in by_seed.items():
                best = rate in (0.0, row.middle)
                if not best and seed:
                    continue
                values = {"test": test, "validation": float(best), "macro_f1": test, "trained": 7, "bytes": 1e6}
                record = Record(SETTING.cell(row, rate, seed), Sources("", "", {}), values)
                store.add(record, {"step_ms": 10.0, "peak_mb": 100})


def test_rows_are_compared_seed_by_seed(tmp_path: Path) -> None:
    """Differences between cells of the same seed have their own interval, narrower than that of the means."""
    spread = {seed: 0.5 + 0.05 * seed for seed in SEEDS}
    above = {seed: value + 0.02 + 0.001 * (seed % 2) for seed, value in spread.items()}
    near = {seed: value + 0.02 - 0.002 * (seed % 2) for seed, value in spread.items()}
    stored(tmp_path, {ALONE: spread, "LoRA": above, "DoRA": near, "OFT": {0: 0.9}})
    table = Table(SETTING, {ROWS[name]: True for name in (ALONE, "LoRA", "DoRA", "OFT", "BitFit")}, tmp_path)
    assert [*table.rows] == [ALONE, "LoRA", "DoRA", "OFT"]
    lora, alone = table.rows["LoRA"], table.rows[ALONE]
    assert lora.over(alone).is_above_zero and lora.interval().half > 10 * lora.over(alone).half
    assert table.best() is lora, "a row without all its seeds is not the best one"
    assert table.as_good(lora) == [table.rows["DoRA"]]


def test_the_page_says_what_is_missing_and_what_is_below_the_head_alone(tmp_path: Path) -> None:
    stored(
        tmp_path,
        {
            ALONE: dict.fromkeys(SEEDS, 0.5),
            "LoRA": {seed: 0.6 + 0.001 * seed for seed in SEEDS},
            "full": {seed: 0.4 + 0.001 * seed for seed in SEEDS},
        },
    )
    text = "\n".join([*summary(tmp_path), *sections(tmp_path)])
    methods = "Of the methods with 5 seeds, above the head alone: LoRA. Below it: full. Not distinguishable: none."
    assert methods in text
    assert f"{len(ROWS) - 3} of {len(ROWS)} rows have not been computed yet." in text
    assert "LoRA (60.2 ± 0.2) has the highest mean of 3 rows with all seeds, of 14 planned" in text
    assert ". Not distinguishable from it: none. Below it: head alone (" in text and "; full (" in text
    assert "No method is above" not in text
    assert text.count("not computed yet") >= len(TABLES)


def test_a_summary_has_paired_differences(tmp_path: Path) -> None:
    """Means vary with the seed, their differences hardly do; and the best is not above the head alone."""
    spread = {seed: 0.5 + 0.05 * seed for seed in SEEDS}
    small = (0.01, -0.012, 0.011, -0.01, 0.002)
    above = {seed: value + small[seed] for seed, value in spread.items()}
    stored(tmp_path, {ALONE: spread, "LoRA": above, "full": {seed: value - 0.1 for seed, value in spread.items()}})
    text = "\n".join(summary(tmp_path))
    wide = r"\(60\.0 ± \d+\.\d\)"
    assert re.search(rf"\*\*No method is above training the head alone\*\* {wide}: LoRA \(60\.0 ± \d+\.\d\)", text)
    assert "Not distinguishable from it: head alone (0.0 ± 1.3)" in text
    assert "Below it: full (-10.0 ± 1.3)" in text


def test_figures_hide_nothing() -> None:
    """Zero has no sign, an interval's end is on the right side of zero, and no size is zero."""
    shown = [
        Interval(mean, half).shown(sign="+") for mean, half in ((-0.04, 1.6), (0.0, 0.0), (6.6, 6.572), (-2, 2.04))
    ]
    assert shown == ["0.0 ± 1.6", "0.0 ± 0.0", "+6.60 ± 6.57", "-2.00 ± 2.04"]
    assert [size(1_540), size(42_560_000)] == ["0.002 MB", "42.56 MB"]


def test_every_method_is_a_row() -> None:
    """Except those for other kinds of models, and the general form of the bottleneck adapters."""
    from graftc.specs.registry import method_specs

    builtin = {tag for tag, spec in method_specs().items() if spec.spec_class.__module__.startswith("graftc.")}
    assert builtin - {row.method for row in ROWS.values()} == {"alora", "cross_attention", "bottleneck"}


def settings_of(cell: Cell) -> Any:
    return cell.settings["spec"]


def test_the_head_trains_in_every_cell() -> None:
    for cell in encoder().plan(lambda _: None):
        spec = settings_of(cell)
        if spec is not None and cell.name not in FLOORS:
            assert spec["train"] == [tasks.HEAD], cell
