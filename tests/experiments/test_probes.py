"""Probes: figures that are right where the answer is known, and that looking does not change what is trained."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from experiments import attention, composing, directions
from experiments.combined import tasks_in
from experiments.encoder import encoder_of
from experiments.probes_plan import (
    COMPOSED,
    COMPOSITION,
    MODULES,
    attention_setting,
    composition_setting,
    directions_setting,
    probe_files,
    probes,
)
from experiments.probing import encoded_texts, fitted
from experiments.tasks import task_of
from experiments.training_plans import ROWS, SEEDS


def test_changes_of_known_weights() -> None:
    """Scaling rows changes magnitudes alone, turning them changes directions alone."""
    before = torch.tensor([[3.0, 4.0], [1.0, 0.0]])
    assert directions.change(before, before * torch.tensor([[2.0], [1.0]])) == pytest.approx((2.5, 0.0))
    turned = torch.tensor([[3.0, 4.0], [0.0, 1.0]])
    assert directions.change(before, turned) == pytest.approx((0.0, 0.5))
    assert directions.change(before, before) == (0.0, pytest.approx(0.0, abs=1e-15))


def test_correlations_of_known_changes() -> None:
    assert directions.correlation([(1.0, 3.0), (2.0, 2.0), (3.0, 1.0)]) == pytest.approx(-1)
    assert directions.correlation([(0.0, 3.0), (0.0, 2.0)]) == 0.0


def test_shares_of_known_attention() -> None:
    """Padding neither attends nor counts; the last token of a text is where its mask ends."""
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])
    even = torch.tensor([[1 / 3, 1 / 3, 1 / 3, 0.0]] * 4), torch.full((4, 4), 0.25)
    only_last = torch.zeros(4, 4), torch.zeros(4, 4)
    only_last[0][:, 2], only_last[1][:, 3] = 1.0, 1.0
    middle = torch.zeros(4, 4), torch.zeros(4, 4)
    middle[0][:, 1], middle[1][:, 1] = 1.0, 1.0
    heads: Tensor = torch.stack([torch.stack(own) for own in (even, only_last, middle)], dim=1)
    expected = [(2 / 3 + 2 / 4) / 2, 1.0, 0.0]
    assert attention.shares(heads, mask).tolist() == pytest.approx(expected)


@pytest.mark.full
def test_attention_is_that_of_the_model() -> None:
    """The outputs of the classifier with attention are those of the one without, and its shares are in range."""
    cell = attention_setting(quick=True).cell(ROWS["full"], 1e-3, 0).to_json()
    figures = attention.figures(cell)
    assert 0 <= figures["least"] <= figures["share"] <= 1 and 0 < figures["even"] < 1
    plain = encoder_of("tiny-bert", 3, 0).eval()
    plain.set_attn_implementation("eager")
    other = attention.AttentiveClassifier(plain.config).eval()
    other.load_state_dict(plain.state_dict())
    ids = torch.randint(5, 50, (2, 7), generator=torch.Generator().manual_seed(0))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        torch.testing.assert_close(other(**inputs).logits, plain(**inputs).logits, rtol=0, atol=0)
        assert len(other(**inputs).attentions) == plain.config.num_hidden_layers


@pytest.mark.full
def test_looking_changes_nothing() -> None:
    """A model that was merged several times while it trained ends with the same values as one that was not."""
    cell = {**directions_setting(quick=True).cell(ROWS["DoRA"], 1e-2, 0).to_json(), "steps": 8}
    task = task_of(cell["settings"], 0)
    texts, _, _ = encoded_texts(cell, task)
    merged: list[Tensor] = []

    def look(compiled: Any) -> None:
        merged.append(next(iter(compiled.merge().state_dict().values())).sum())

    ends = [fitted(cell, encoder_of("tiny-bert", task.outputs, 0), texts, own) for own in (None, look)]
    assert len(merged) == 4
    first, second = (end.adapter_state_dict() for end in ends)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.sample("LT-SFT")
@pytest.mark.parametrize("row", COMPOSITION, ids=lambda row: row.name)
def test_composed_models(row: Any) -> None:
    """The change of one task alone keeps all of its accuracy; a sparse change touches few values."""
    cell = composition_setting(quick=True).cell(row, 1e-3, 0).to_json()
    figures = composing.figures({**cell, "settings": {**cell["settings"], "task": "r8"}})
    assert figures["kept"] == 0 and figures["composed"] == figures["alone"]
    assert (figures["changed"] < 0.2) == (row.name == "LT-SFT") and figures["changed"] > 0


def test_a_probe_depends_on_the_texts_of_all_its_tasks() -> None:
    parts = {part.name: part for part in probes()}
    assert parts.keys() == MODULES.keys()
    cell = parts["composition"].plan(lambda _: None)[0]
    assert tasks_in(cell.settings["task"]) == [*COMPOSED]
    assert {"reuters-r8-train.tab", "20newsgroups-test.tab"} <= {path.name for path in probe_files(cell)}


def test_seeds_of_probes() -> None:
    """Figures of the model as it is do not depend on a seed."""

    def known(cell: Any) -> dict[str, float]:
        return {"validation": -abs(math.log10(cell.rate / 1e-3))} if cell.rate else {}

    for part, count in zip(probes(), (len(SEEDS), len(SEEDS), 3), strict=True):
        seeds = {(cell.name, cell.seed) for cell in part.plan(known)}
        plain = {name for name, _ in seeds if name == "as it is"}
        assert len(seeds) == len(plain) + count * len({name for name, _ in seeds} - plain)
