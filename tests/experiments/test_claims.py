"""Claims are judged by their rules: each verdict appears, and a wrong figure changes it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from experiments.cells import Sources
from experiments.claims import CLAIMS, HELD, MISSING, NOT_HELD, UNSAID, section
from experiments.claims_plan import BATCHES, BY_PLACE, BY_RANK, FEW, LOW_DATA, few, large_batches, usual
from experiments.probes_plan import (
    ATTENTION,
    COMPOSITION,
    DIRECTIONS,
    attention_setting,
    composition_setting,
    directions_setting,
)
from experiments.store import Record, Store
from experiments.training_plans import LADDER, ROWS, Repeated, Row, encoder_settings

ENCODER = encoder_settings()[0]
JUDGES = {claim.judge.__name__: claim.judge for claim in CLAIMS}


def keep(folder: Path, setting: Repeated, row: Row, tests: Sequence[float], best: float | None = None) -> None:
    """Store the sweep of a row around its best rate, and a cell at it for every seed."""
    best = row.middle if best is None else best
    store, place = Store(setting.part, folder), LADDER.index(row.middle)
    low, high = min(place - 1, LADDER.index(best) - 1), max(place + 1, LADDER.index(best) + 1)
    for rate in LADDER[low : high + 1]:
        for seed, test in zip(setting.seeds, tests, strict=False):
            if seed == 0 or rate == best:
                figures = {"test": test, "validation": -abs(LADDER.index(rate) - LADDER.index(best)) / 10, "trained": 1}
                store.add(Record(setting.cell(row, rate, seed), Sources("", "", {}), figures), {})


def test_nothing_is_said_without_cells(tmp_path: Path) -> None:
    assert {claim.judge(tmp_path).word for claim in CLAIMS} == {MISSING}
    assert "\n".join(section(tmp_path)).count(MISSING) == len(CLAIMS) == len(JUDGES)


@pytest.mark.parametrize(("lora", "word"), [(1e-3, HELD), (3e-3, HELD), (1e-4, NOT_HELD)])
def test_the_ratio_of_rates(lora: float, word: str, tmp_path: Path) -> None:
    keep(tmp_path, ENCODER, ROWS["full"], [0.5], 1e-4)
    keep(tmp_path, ENCODER, ROWS["LoRA"], [0.5], lora)
    verdict = JUDGES["rates_differ"](tmp_path)
    assert verdict.word == word and len(verdict.rows) == 2


@pytest.mark.parametrize(
    ("rates", "word"), [((1e-3,) * 4, HELD), ((1e-3, 1e-3, 3e-3, 3e-3), HELD), ((3e-3, 1e-3, 1e-3, 3e-4), NOT_HELD)]
)
def test_rates_of_ranks(rates: Sequence[float], word: str, tmp_path: Path) -> None:
    for row, rate in zip(BY_RANK, rates, strict=True):
        keep(tmp_path, usual(), row, [0.5], rate)
    assert JUDGES["rate_is_that_of_every_rank"](tmp_path).word == word


@pytest.mark.parametrize(
    ("differences", "word"),
    [
        ((0.02, 0.021, 0.019, 0.02, 0.02), HELD),
        ((-0.02, -0.021, -0.019, -0.02, -0.02), NOT_HELD),
        ((0.02, -0.021, 0.019, -0.02, 0.0), UNSAID),
    ],
)
def test_rows_are_compared_by_differences(differences: Sequence[float], word: str, tmp_path: Path) -> None:
    first, second = BY_PLACE
    spread = [0.5 + 0.1 * seed for seed in range(5)]
    keep(tmp_path, usual(), second, spread)
    keep(tmp_path, usual(), first, [a + b for a, b in zip(spread, differences, strict=True)])
    assert JUDGES["mlp_before_attention"](tmp_path).word == word


@pytest.mark.parametrize(("full", "word"), [(0.605, HELD), (0.65, NOT_HELD)])
def test_biases_may_be_a_point_below(full: float, word: str, tmp_path: Path) -> None:
    keep(tmp_path, ENCODER, ROWS["BitFit"], [0.6] * 5)
    keep(tmp_path, ENCODER, ROWS["full"], [full + 0.001 * (seed % 2) for seed in range(5)])
    assert JUDGES["biases_are_enough"](tmp_path).word == word


@pytest.mark.parametrize(("costs", "word"), [((0.10, 0.02), HELD), ((0.02, 0.10), NOT_HELD)])
def test_costs_of_large_batches(costs: tuple[float, float], word: str, tmp_path: Path) -> None:
    """The first is what LoRA loses, the second what full fine-tuning loses."""
    lost: Mapping[str, float] = dict(zip(("LoRA", "full"), costs, strict=True))
    for row in BATCHES:
        keep(tmp_path, ENCODER, row, [0.6 + 0.01 * seed for seed in range(5)])
        keep(tmp_path, large_batches(), row, [0.6 + 0.0101 * seed - lost[row.name] for seed in range(5)])
    assert JUDGES["large_batches_cost_more"](tmp_path).word == word


def test_a_verdict_has_a_reason(tmp_path: Path) -> None:
    """The end of a sweep, an interval, or both; what is said has none."""
    spread = [0.5 + 0.1 * seed for seed in range(5)]
    keep(tmp_path, ENCODER, ROWS["LoRA"], spread)
    keep(tmp_path / "unclear", ENCODER, ROWS["LoRA"], spread)
    keep(tmp_path, ENCODER, ROWS["DoRA"], [value + 0.02 + 0.0001 * (number % 2) for number, value in enumerate(spread)])
    unclear = [value + (0.02, -0.021, 0.019, -0.02, 0.0)[number] for number, value in enumerate(spread)]
    keep(tmp_path / "unclear", ENCODER, ROWS["DoRA"], unclear)
    held, unsaid = (JUDGES["magnitude_helps"](folder) for folder in (tmp_path, tmp_path / "unclear"))
    assert (held.word, held.reason, unsaid.word) == (HELD, "", UNSAID)
    assert unsaid.reason == "the interval of the differences contains zero"


def test_the_end_of_a_sweep_is_a_reason(tmp_path: Path) -> None:
    """A sweep that has as many rates as it may have, the last of them the best."""
    keep(tmp_path, ENCODER, ROWS["full"], [0.5], 1e-4)
    store = Store(ENCODER.part, tmp_path)
    for number, rate in enumerate((3e-4, 1e-3, 3e-3, 1e-2, 3e-2)):
        figures = {"test": 0.5, "validation": 0.1 * number, "trained": 1}
        store.add(Record(ENCODER.cell(ROWS["LoRA"], rate, 0), Sources("", "", {}), figures), {})
    verdict = JUDGES["rates_differ"](tmp_path)
    assert verdict.word == UNSAID and verdict.reason == "the best rate of LoRA (0.03) is at the end of its sweep"
    assert len(verdict.cells) == 5 + 3 and "ahead of the next best rate by 25, 25 of 250" in verdict.figure


@pytest.mark.parametrize(("over", "word"), [(0.1, HELD), (-0.1, NOT_HELD)])
def test_the_smallest_sizes_decide_of_prefixes(over: float, word: str, tmp_path: Path) -> None:
    full, prefix = LOW_DATA
    for size in FEW:
        own = over if size <= 2 else -over
        keep(tmp_path, few(size), full, [0.5, 0.51, 0.52])
        keep(tmp_path, few(size), prefix, [0.5 + own, 0.511 + own, 0.52 + own])
    assert JUDGES["prefixes_need_less_data"](tmp_path).word == word


def probed(folder: Path, setting: Repeated, rows: Sequence[Row], figures: Sequence[Mapping[str, float]]) -> None:
    """Store the cells of a probe, whose figures grow a little with the seed."""
    store = Store(setting.part, folder)
    for row, own in zip(rows, figures, strict=True):
        rates = [0.0] if row.fields is None else LADDER[LADDER.index(row.middle) - 1 : LADDER.index(row.middle) + 2]
        for rate in rates:
            for seed in setting.seeds if rate == row.middle else setting.seeds[:1]:
                values = {name: value + 1e-4 * seed for name, value in own.items()}
                values |= {"validation": float(rate == row.middle)}
                store.add(Record(setting.cell(row, rate, seed), Sources("", "", {}), values), {})


@pytest.mark.parametrize(("dora", "word"), [(-0.2, HELD), (0.9, NOT_HELD)])
def test_correlations_are_compared_by_their_distance_from_full(dora: float, word: str, tmp_path: Path) -> None:
    """Full fine-tuning's is -0.5 and LoRA's 0.3: DoRA's is nearer, or farther away."""
    probed(tmp_path, directions_setting(), DIRECTIONS, [{"correlation": value} for value in (-0.5, 0.3, dora)])
    assert JUDGES["changes_as_full_does"](tmp_path).word == word


@pytest.mark.parametrize(
    ("sparse", "composed", "word"), [(-0.01, 0.8, HELD), (-0.2, 0.8, NOT_HELD), (-0.01, 0.3, UNSAID)]
)
def test_what_sums_keep(sparse: float, composed: float, word: str, tmp_path: Path) -> None:
    """A method that learns nothing loses nothing in a sum, which says nothing."""
    figures = [{"kept": -0.1, "composed": 0.6}, {"kept": sparse, "composed": composed}]
    probed(tmp_path, composition_setting(), COMPOSITION, figures)
    assert JUDGES["sparse_changes_add_up"](tmp_path).word == word


@pytest.mark.parametrize(("plain", "pasta", "word"), [(0.6, 0.7, HELD), (0.6, 0.4, NOT_HELD), (0.4, 0.7, NOT_HELD)])
def test_special_tokens_need_half(plain: float, pasta: float, word: str, tmp_path: Path) -> None:
    """As the model is and after training; what full fine-tuning does to attention is shown only."""
    figures = [{"least": value, "even": 0.1} for value in (plain, 0.3, pasta)]
    probed(tmp_path, attention_setting(), ATTENTION, figures)
    assert JUDGES["special_tokens_are_attended"](tmp_path).word == word


def test_ranks_of_equal_size() -> None:
    """In MiniLM's layers, both places have the same number of values at these ranks."""
    width, inner = 384, 1536
    by_rank = {"attn": 4 * 2 * width, "ffn": 2 * (width + inner)}
    mlp, attention = (row.fields or {} for row in BY_PLACE)
    assert by_rank["ffn"] * mlp["rank"] == by_rank["attn"] * attention["rank"]
    assert mlp["alpha"] / mlp["rank"] == attention["alpha"] / attention["rank"]
