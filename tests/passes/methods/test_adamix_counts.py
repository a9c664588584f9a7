"""Published parameter counts of AdaMix, trained and deployed, computed from configs alone on the meta device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest

from tests.compiler.test_published_counts import BERT_BASE, GPT2_MEDIUM, QV, ROBERTA_LARGE
from tests.kit.depth import each_way


@dataclass(frozen=True)
class Row:
    """One row of the table of published figures.

    Attributes:
        number: the number of the row.
        model: the model's class, its config's class and the config's values.
        entry: the adaptation.
        deployed, trained: the exact counts.
        shown: the published figure, which counts deployed parameters; None if it cannot be derived.
    """

    number: str
    model: tuple[str, str, dict[str, Any]]
    entry: dict[str, Any]
    deployed: int
    trained: int
    shown: str | None


ROWS = (
    Row("12", ROBERTA_LARGE, {"method": "adamix"}, 811_392, 1_992_192, "0.8M"),
    Row("20", BERT_BASE, {"method": "adamix", "bottleneck": 48}, 894_528, 2_223_360, "0.9M"),
    Row("28", GPT2_MEDIUM, {"method": "adamix", "bottleneck": 8, "experts": 8}, 417_984, 1_795_584, "0.42M"),
    # Published as 0.35M, which is 0.1 % of the model.
    Row("29", GPT2_MEDIUM, {"method": "adamix_lora", "target": {"role": QV}}, 393_216, 1_769_472, None),
)


@pytest.mark.slow
@pytest.mark.sample("row 20-two depths")
@each_way
@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"row {row.number}")
def test_a_published_row(row: Row, count: Any) -> None:
    report = count([row.entry], row.model)
    assert (report.deployed_parameters, report.trainable_parameters) == (row.deployed, row.trained)
    if row.shown is not None:
        digits = len(row.shown.rstrip("M").partition(".")[2])
        assert f"{report.deployed_parameters / 1e6:.{digits}f}M" == row.shown
