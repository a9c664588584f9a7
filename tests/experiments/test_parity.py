"""The comparison with PEFT holds on tiny models at its gates, and notices factors that differ."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments import exact, parity
from experiments.cells import Cell, Sources
from experiments.explaining import GATES, ROUNDED, UNKNOWN, causes, misses
from experiments.parity_plan import CAUSAL, METHODS
from experiments.parity_plan import exact as planned_exact
from experiments.parity_plan import parity as planned
from experiments.sources import base_of, batches_of
from experiments.store import Record

PLANNED = planned(quick=True).plan(lambda _: None)
CELLS = {(cell.name, cell.dtype): cell for cell in PLANNED if cell.model == "tiny-bert"}
DOUBLES = planned_exact(quick=True).plan(lambda _: None)
SOURCES = Sources("", "", {})


def record(cell: Cell) -> Record:
    return Record(cell, SOURCES, parity.figures(cell.to_json()))


@pytest.mark.slow
@pytest.mark.sample("IA3")
@pytest.mark.parametrize("name", ["LoRA", "IA3"])
def test_methods_agree_within_the_gates(name: str) -> None:
    """In float64, final tensors and merged logits agree as well."""
    own = record(CELLS[name, "float64"])
    assert misses(own) == ()
    assert own.figures["tensors"] <= 1e-12 and own.figures["merged"] <= 1e-12
    assert own.figures["parameters"] == own.figures["peft_parameters"] > 0
    assert own.figures["start"] != own.figures["end"]


@pytest.mark.slow
def test_a_decoder_agrees_in_float64() -> None:
    """Losses, final tensors and merged logits agree, which float32 in norms or in the loss would not allow."""
    (cell,) = (cell for cell in DOUBLES if cell.name == "LoRA")
    own = Record(cell, SOURCES, exact.figures(cell.to_json()))
    assert misses(own) == ()
    assert max(own.figures[name] for name in ("losses", "tensors", "merged")) <= 1e-12
    assert own.figures["start"] != float(torch.tensor(own.figures["start"]))


def test_the_exact_decoder_is_the_same_model() -> None:
    """Its logits and its loss are those of the model as it is, up to float32 in the latter."""
    (batch,) = batches_of("tiny-llama", 1, 2, 12, 0)
    plain = base_of("tiny-llama", torch.float64, 0)(**batch)
    same = exact.exact(base_of("tiny-llama", torch.float64, 0))(**batch)
    assert 0 < float((plain.logits - same.logits).detach().abs().max()) < 1e-5
    assert float(same.loss.detach()) == pytest.approx(float(plain.loss.detach()), abs=1e-6)
    with pytest.raises(ValueError, match="no norms of Llama"):
        exact.exact(torch.nn.Linear(2, 3))


@pytest.mark.slow
def test_a_factor_that_differs_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """One factor of PEFT's, changed by a millionth, misses the gates of float64 but not those of the losses."""
    loaded = parity._loaded

    def changed(base: Any, folder: Path) -> Any:
        model = loaded(base, folder)
        with torch.no_grad():
            next(p for p in model.parameters() if p.requires_grad).mul_(1 + 1e-6)
        return model

    monkeypatch.setattr(parity, "_loaded", changed)
    own = record(CELLS["IA3", "float64"])
    assert {"first_loss", "gradients"} <= set(misses(own))
    assert list(causes([own])) == [UNKNOWN]


def test_differences_are_relative_to_the_largest_entry() -> None:
    theirs = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.5])}
    ours = {"a": torch.tensor([1.0, -4.0]), "b": torch.tensor([1.5]), "frozen": torch.zeros(1)}
    assert parity.apart(ours, theirs) == 0.25
    with pytest.raises(ValueError, match="no tensor"):
        parity.apart({"a": ours["a"]}, theirs)
    with pytest.raises(ValueError, match="other shapes"):
        parity.apart({**ours, "b": torch.zeros(2)}, theirs)


@pytest.mark.parametrize(("in_float64", "cause"), [(1e-13, ROUNDED), (1e-11, UNKNOWN)])
def test_rounding_is_what_float64_does_not_have(in_float64: float, cause: str) -> None:
    """A gradient that differs in float32 alone is rounded; one that differs in float64 as well is wrong."""
    figures = {"first_loss": 0.0, "losses": 0.0}
    own = Record(CELLS["LoRA", "float32"], SOURCES, {**figures, "gradients": 1.5e-6})
    exact = Record(CELLS["LoRA", "float64"], SOURCES, {**figures, "gradients": in_float64})
    assert misses(own) == ("gradients",)
    assert [name for name, rows in causes([own, exact]).items() if own in rows] == [cause]
    assert list(causes([own])) == [UNKNOWN]


def test_no_number_is_a_miss() -> None:
    figures = {"first_loss": float("nan"), "gradients": 0.0, "losses": 0.0}
    assert misses(Record(CELLS["LoRA", "float64"], SOURCES, figures)) == ("first_loss",)
    assert misses(Record(copy.copy(CELLS["LoRA", "bfloat16"]), SOURCES, figures)) == ()
    assert set(GATES) == {"float32", "float64"}


def test_every_type_that_is_exported_is_planned() -> None:
    """Every method that has a format of PEFT's is a row of the table."""
    from graftc.specs.registry import method_specs

    rows = {fields["method"] for fields in {**METHODS, **CAUSAL}.values()}
    formats = {tag for tag, spec in method_specs().items() if vars(spec.spec_class).get("peft") is not None}
    assert rows == formats
