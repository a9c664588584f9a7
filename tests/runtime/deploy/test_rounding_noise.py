"""The budget of outputs in 16 bits: differences from other roundings of folded weights do not mean a wrong fold."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from graftc.compiler.folding import certificate
from graftc.compiler.folding.steps import as_cast, fold_steps
from graftc.passes.core.weights.folds import LazyTensors, round_once
from graftc.runtime.deploy import certifying as module
from graftc.runtime.deploy.rounding_noise import rounding_noise
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import tiny
from tests.kit.models import adapted

SPEC = {"adapt": [{"method": "lora", "rank": 4, "target": {"role": ["attn.q", "ffn.down"]}}]}


@pytest.fixture(scope="module")
def llama() -> Any:
    return adapted(tiny("llama", dtype=torch.bfloat16), **SPEC)


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Set a default budget that no fold in 16 bits meets."""
    monkeypatch.setattr(module, "DEFAULT_BUDGET", {**certificate.DEFAULT_BUDGET, torch.bfloat16: 1e-6})


@pytest.mark.slow
def test_a_difference_that_any_rounding_makes_is_allowed(llama: Any, narrow: None) -> None:
    merged = llama.merge()
    (note,) = merged.certificate.notes
    assert merged.certificate.passed and "rounding the folded weights differently" in note
    assert 0 < merged.certificate.largest_difference <= merged.certificate.budget < 1
    own, other = (m.to_transformers().state_dict() for m in (merged, llama.merge(budget=10)))
    assert all(torch.equal(own[name], other[name]) for name in own), "weights are not what they were"


@pytest.mark.slow
def test_a_larger_difference_is_refused(llama: Any, narrow: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rounding_noise", lambda *given: 1e-9)
    with pytest.raises(GraftError) as caught:
        llama.merge()
    assert caught.value.code == "GC051"


def test_a_budget_that_is_given_holds(llama: Any) -> None:
    with pytest.raises(GraftError) as caught:
        llama.merge(budget=1e-6)
    assert caught.value.code == "GC051"


def test_the_usual_budget_costs_no_other_run(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "rounding_noise", lambda *a, **k: pytest.fail("outputs keep to the budget"))
    assert llama.merge().certificate.notes == ()


def test_entries_move_by_a_unit_in_the_last_place_at_most() -> None:
    weight, seen = torch.randn(64, 65).bfloat16(), []
    before, change = weight.clone(), torch.full((64, 65), 0.5, dtype=torch.float64)

    def run() -> list[torch.Tensor]:
        seen.append(weight.clone())
        return [weight.float()]

    noise = rounding_noise({"w": weight}, lambda name: change, run, [before.float()])
    first, *others = seen
    assert torch.equal(weight, before) and not torch.equal(*others[:2])
    assert torch.equal(first, (before + change).bfloat16())
    exponent = torch.floor(torch.log2(before.double().abs()))
    for other in others:
        moved = (other.double() - before.double()).abs() / (2.0**exponent * torch.finfo(torch.bfloat16).eps)
        assert float(moved.max()) == 1 and 0.1 < float((moved > 0).double().mean()) < 0.5
    assert math.isclose(noise, max(float((s.float() - before.float()).abs().max()) for s in seen))


def test_no_more_roundings_than_needed() -> None:
    weight, seen = torch.ones(8, 8).bfloat16(), []

    def run() -> list[torch.Tensor]:
        seen.append(weight.clone())
        return [weight.float()]

    same = torch.zeros(8, 8, dtype=torch.float64)
    rounding_noise({"w": weight}, lambda name: same, run, [torch.ones(8, 8)], lambda worst: worst >= 1e-3)
    assert len(seen) == 2, "the cast changes nothing here, and the first rounding is enough"


def test_what_the_graph_casts_counts(llama: Any) -> None:
    """Factors cast to 16 bits, as in the graph, fold into other weights than the factors themselves."""
    compilation = llama.compilation
    cast = as_cast(compilation, ("lora",))
    exact = LazyTensors(compilation.store, fold_steps(compilation))
    for name in exact.names:
        site = name.removesuffix(".weight")
        a, b = (compilation.store.get(f"{site}.graftc.lora.{part}").detach().bfloat16().double() for part in "AB")
        wanted = torch.addmm(compilation.store.get(name).double(), b, a, alpha=4)  # 16 / 4
        assert torch.equal(cast.folded(name), round_once(wanted, torch.bfloat16))
        assert not torch.equal(cast.folded(name), exact.folded(name))
