"""The benchmark of training steps runs and its output is complete; no time that it measures decides a test."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.command import chosen
from benchmarks.train.__main__ import ENTRIES, main
from benchmarks.train.contestants import Aims, Entry, Live, UnavailableError
from benchmarks.train.measure import Measured, contest, mismatches, peak_bytes, saved_bytes
from benchmarks.train.models import TINY, Base, base, fill, place_of, shared_copy
from benchmarks.train.plot import rows
from benchmarks.train.report import as_markdown, figures, machine


@pytest.mark.full
def test_every_entry_runs_and_its_figures_are_complete(tmp_path: Path) -> None:
    assert main(["--quick", "--out", str(tmp_path)]) == 0
    data = json.loads((tmp_path / "train.json").read_text())
    assert {*data["entries"], *data["skipped"]} == {entry.name for entry in ENTRIES}
    assert data["machine"]["processor"] and data["machine"]["threads"] == torch.get_num_threads()
    assert data["versions"].keys() == {"torch", "transformers", "peft", "graftc"}
    assert data["command"] == f"python -m benchmarks.train --quick --out {tmp_path}"
    assert data["rounds"] == 2 and data["model"]["width"] == TINY.width
    for name, entry in data["entries"].items():
        assert entry["saved_bytes"] > 0 and entry["peak_bytes"] > 0 and entry["loss"] > 0, name
        assert all(len(turns) == 2 and min(turns) > 0 for turns in entry["rounds"].values()), name
        assert entry["over_floor"] > 0 and (entry["over_peer"] is None) == (entry["peer"] is None), name
        assert entry["trained_parameters"] > 0 or name == "floor"
        wanted = {figure for figure, aim in entry["aims"].items() if aim is not None}
        assert entry["reached"].keys() == wanted, name
    text = (tmp_path / "train.md").read_text()
    assert all(f"| {name} | " in text for name in data["entries"])
    assert all(f"Skipped: {name} (" in text for name in data["skipped"])


@pytest.fixture(scope="module")
def tiny() -> Base:
    return base(TINY)


def test_saved_bytes_are_what_is_alive_after_the_forward_pass(tiny: Base) -> None:
    """A product saves both factors; the base's weights, freed tensors and second views of a storage do not count."""
    weight = next(tiny.model.parameters())
    x, y = torch.ones(8, requires_grad=True), torch.ones(8, requires_grad=True)

    def forward() -> Tensor:
        (x * 2).exp()  # freed with its result
        return (x * y).sum() + (x[:4] * y[4:]).sum() + (weight * torch.ones(1, requires_grad=True)).sum()

    assert saved_bytes(forward, tiny.model) == 2 * 8 * 4
    assert saved_bytes(lambda: (weight * x[0]).sum(), tiny.model) == 0
    assert saved_bytes(lambda: (x.exp()).sum(), tiny.model) == 8 * 4


def test_the_peak_is_over_what_there_was() -> None:
    kept = torch.ones(1000)

    def step() -> None:
        first = kept + 1
        second = first + 1
        del first
        second.add_(1)

    assert 8000 <= peak_bytes(step) < 8100


def test_copies_share_all_tensors_and_no_module(tiny: Base) -> None:
    copied = shared_copy(tiny.model)
    assert {id(p) for p in copied.parameters()} == {id(p) for p in tiny.model.parameters()}
    assert not {id(m) for m in copied.modules()} & {id(m) for m in tiny.model.modules()}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight", ("model.layers.0.mlp.up_proj", "A")),
        ("base_model.model.model.layers.0.mlp.up_proj.lora_B.default", ("model.layers.0.mlp.up_proj", "B")),
        ("base_model.model.model.layers.0.q.lora_magnitude_vector.default.weight", ("model.layers.0.q", "vector")),
        ("base_model.model.model.layers.0.q.ia3_l.default", ("model.layers.0.q", "vector")),
        ("model.layers.0.q.graftc.lora.A", ("model.layers.0.q", "A")),
        ("model.layers.0.q.graftc.dora.magnitude", ("model.layers.0.q", "vector")),
    ],
)
def test_places_of_adapter_tensors(name: str, expected: tuple[str, str]) -> None:
    assert place_of(name) == expected


def test_an_entry_that_cannot_run_is_skipped_with_the_reason(tiny: Base) -> None:
    def unavailable(base: Base) -> Live:
        raise UnavailableError("not yet")

    told: list[str] = []
    results, skipped = contest([Entry("new", "graftc", unavailable)], tiny, 1, tell=told.append)
    assert results == [] and skipped == {"new": "not yet"} and told[0] == "new: skipped: not yet"


def measured(name: str, seconds: list[float], **fields: Any) -> Measured:
    result = Measured(
        Entry(name, "graftc", lambda base: Live(base.model, lambda: base.embeddings.sum(), 0), **fields), 1, 2.0, 8, 9
    )
    result.timing.forward, result.timing.backward = seconds, [0.0] * len(seconds)
    result.timing.processor = seconds
    return result


def test_ratios_are_of_rounds_and_aims_are_upper_limits() -> None:
    aims = Aims(over_floor=2.0, over_peer=1.0)
    results = [measured("floor", [1, 2, 4]), measured("a", [2, 2, 4]), measured("b", [2, 4, 16], peer="a", aims=aims)]
    data = figures(results, {"c": "gone"}, TINY, command="it", date="now", before=machine())
    assert (data["entries"]["b"]["over_floor"], data["entries"]["b"]["over_peer"]) == (2, 2)
    assert data["entries"]["b"]["reached"] == {"over_floor": True, "over_peer": False}
    text = as_markdown(data, "plot.png")
    assert "| 2.00 (2.00) | **2.00** (1.00) |" in text and "Skipped: c (gone)." in text and "(plot.png)" in text


def test_another_loss_than_the_peers_is_noticed() -> None:
    same, other = (measured(name, [1.0], peer="a", exact=True) for name in "bc")
    other.loss = 2.01
    assert mismatches([measured("a", [1.0]), same, other]).keys() == {"c"}


def test_some_entries_bring_their_peers_and_the_floor() -> None:
    assert [entry.name for entry in chosen(ENTRIES, "graftc IA3")] == ["floor", "peft IA3", "graftc IA3"]


def test_groups_stand_apart() -> None:
    placed = rows({"floor": {"peer": None}, "a": {"peer": None}, "b": {"peer": "a"}})
    (_, first), (_, second), (_, third) = placed
    assert second - first > third - second
    assert third - second == pytest.approx(1)


@pytest.mark.slow
def test_values_do_not_depend_on_the_library(tiny: Base) -> None:
    """With the same values, peft's and graftc's version of a method compute the same loss."""
    losses = {}
    for entry in chosen(ENTRIES, "^(peft|graftc) LoRA$"):
        live = entry.make(tiny)
        assert fill(live.model) == live.trained
        losses[entry.name] = live.loss().item()
    assert losses["graftc LoRA"] == pytest.approx(losses["peft LoRA"], rel=1e-6)
    assert losses["floor"] != losses["peft LoRA"]
