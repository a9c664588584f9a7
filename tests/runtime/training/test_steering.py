"""Controllers and objectives in a plain loop: counted, missed, moved, saved and resumed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import perturb
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.refusals import no_warning
from tests.kit.training import adamw, train

TARGET = {"role": ["attn.q", "ffn.down"]}
ADALORA = {"method": "adalora", "target": TARGET, "rank": 4, "target_rank": 2, "final_steps": 2, "dropout": 0.1}
SORA = {"method": "sora", "target": TARGET, "rank": 4, "threshold": 0.02, "l1": 0.1, "dropout": 0.1}
DYLORA = {"method": "dylora", "target": TARGET, "rank": 4, "dropout": 0.1}
METHODS = {"adalora": ADALORA, "sora": SORA, "dylora": DYLORA}
TOTAL = 8


@pytest.mark.full
@pytest.mark.parametrize("method", ["sora", *(m for m in METHODS if m != "sora")])
def test_an_artifact_in_the_middle_of_training_changes_nothing(method: str, tmp_path: Path) -> None:
    """After saving, loading and continuing, parameters and state are, bit for bit, those of an uninterrupted run."""
    whole = fresh("bert", METHODS[method], seed=0)
    whole.begin(TOTAL)
    train(whole, adamw(whole, lr=5e-3), range(TOTAL))
    for middle in (3, 7):
        first = fresh("bert", METHODS[method], seed=0)
        first.begin(TOTAL)
        optimiser = adamw(first, lr=5e-3)
        train(first, optimiser, range(middle))
        first.save(tmp_path / f"artifact{middle}")
        second = graftc.load(tmp_path / f"artifact{middle}", tiny("bert"))
        second.begin(TOTAL)
        resumed = adamw(second, lr=5e-3)
        resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        train(second, resumed, range(middle, TOTAL))
        expected, tensors = whole.adapter_state_dict(), second.adapter_state_dict()
        assert expected.keys() == tensors.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.full
def test_two_adaptations_are_steered_side_by_side() -> None:
    """Each adaptation has its own counter, and their objectives add up."""
    both = fresh("bert", {**ADALORA, "target": {"role": "attn.q"}}, {**SORA, "target": {"role": "ffn.down"}}, seed=0)
    alone = [
        fresh("bert", {**ADALORA, "target": {"role": "attn.q"}}, seed=0),
        fresh("bert", {**SORA, "target": {"role": "ffn.down"}}, seed=0),
    ]
    assert abs(both.extra_loss().item() - sum(one.extra_loss().item() for one in alone)) < 1e-6
    both.begin(TOTAL)
    train(both, adamw(both, lr=5e-3), range(3))
    state = both.adapter_state_dict()
    assert state["graftc.adalora.step"].tolist() == state["graftc.sora.step"].tolist() == [3]


@pytest.mark.slow
def test_without_steering_there_is_nothing_to_do() -> None:
    """With LoRA, every call exists and changes nothing."""
    compiled = fresh("bert", {"method": "lora", "target": TARGET}, seed=0)
    with no_warning():
        compiled.begin(3)
        train(compiled, adamw(compiled, lr=5e-3), range(2))
        assert compiled.extra_loss().item() == 0 and not compiled.extra_loss().requires_grad
        compiled.warn_of_unsteered()


@pytest.mark.slow
def test_state_moves_with_the_model() -> None:
    """Counters, importance and the deployed rank are on the parameters' device, where controllers find them."""
    compiled = fresh(
        "bert", ADALORA, {**SORA, "target": {"role": "ffn.up"}}, {**DYLORA, "target": {"role": "attn.v"}}, seed=0
    )
    compiled.to("meta")
    state = compiled.adapter_state_dict()
    assert {tensor.device.type for tensor in state.values()} == {"meta"}
    assert {name.rpartition(".")[2] for name in state} >= {"step", "E_sensitivity", "B_uncertainty", "kept", "deployed"}
    for controller in compiled.steering.controllers.values():
        assert controller.shared["step"].device.type == "meta"
        assert all(t.device.type == "meta" for place in controller.places for t in place.tensors.values())


@pytest.mark.full
def test_state_is_kept_beside_parameters() -> None:
    """A state dict contains it, and `load_state_dict` restores it."""
    compiled = fresh("bert", ADALORA, seed=0)
    compiled.begin(TOTAL)
    train(compiled, adamw(compiled, lr=5e-3), range(3))
    other = fresh("bert", ADALORA, seed=0)
    other.load_state_dict(compiled.state_dict())
    assert all(torch.equal(other.adapter_state_dict()[n], t) for n, t in compiled.adapter_state_dict().items())
    (controller,) = other.steering.controllers.values()
    assert controller.steps == 3


@pytest.mark.full
def test_steps_left_counts_from_now() -> None:
    """The total that a schedule sees is the sum of the past and the remaining steps."""
    compiled = fresh("bert", ADALORA, seed=0)
    compiled.begin(100)
    train(compiled, adamw(compiled, lr=5e-3), range(3))
    compiled.steps_left(5)
    (controller,) = compiled.steering.controllers.values()
    assert controller.total == 8


@pytest.mark.full
def test_an_objective_that_is_left_out() -> None:
    """The first step that lacks it warns with GC025, once."""
    compiled = fresh("bert", ADALORA, seed=0)
    compiled.begin(TOTAL)
    optimiser = adamw(compiled, lr=5e-3)
    with pytest.warns(GraftWarning, match="GC025.*'adalora' has an objective") as caught:
        train(compiled, optimiser, range(3), extra=False)
    assert len([w for w in caught if isinstance(w.message, GraftWarning)]) == 1
    assert "extra_loss" in (caught[0].message.hint or "")


@pytest.mark.full
def test_an_objective_that_is_left_out_later() -> None:
    """An objective that is left out only after some steps warns as well."""
    compiled = fresh("bert", ADALORA, seed=0)
    compiled.begin(TOTAL)
    optimiser = adamw(compiled, lr=5e-3)
    with no_warning():
        train(compiled, optimiser, range(2))
    with pytest.warns(GraftWarning, match="GC025"):
        train(compiled, optimiser, range(2, 3), extra=False)


@pytest.mark.full
@pytest.mark.parametrize("ending", ["merge", "save", "warn_of_unsteered"])
def test_a_controller_that_never_stepped(ending: str, tmp_path: Path) -> None:
    """Using the result warns with GC025, though gradients have been zeroed by then."""
    compiled = fresh("bert", SORA, seed=0)
    train(compiled, adamw(compiled, lr=5e-3), range(2), after=False)
    with pytest.warns(GraftWarning, match="GC025.*'sora' was trained without"):
        getattr(compiled, ending)(*([tmp_path / "artifact"] if ending == "save" else []))


@pytest.mark.full
def test_an_objective_that_was_never_used() -> None:
    """An objective that was not used warns even if `after_step` is not called."""
    compiled = fresh("bert", {**SORA, "threshold": 0}, seed=0)
    train(compiled, adamw(compiled, lr=5e-3), range(1), extra=False, after=False)
    with pytest.warns(GraftWarning, match="GC025.*'sora' has an objective"):
        compiled.merge()


@pytest.mark.full
def test_no_warning_where_nothing_is_missed(tmp_path: Path) -> None:
    """Untrained models, values that were set, proper steering and an artifact of it cause no warning."""
    with no_warning():
        compiled = fresh("bert", ADALORA, seed=0)
        compiled.merge(allow_unchanged=True)
        perturb(compiled)
        compiled.merge()
        compiled = fresh("bert", ADALORA, seed=0)
        compiled.begin(TOTAL)
        train(compiled, adamw(compiled, lr=5e-3), range(TOTAL))
        compiled.save(tmp_path / "artifact")
        graftc.load(tmp_path / "artifact", tiny("bert")).merge()


@pytest.mark.slow
def test_names_that_are_none() -> None:
    """Calls that take the name of an adaptation raise GC091."""
    compiled = fresh("bert", SORA, seed=0)
    for call in (lambda: compiled.rank_pattern("x"), lambda: compiled.deploy_rank("x", 1)):
        with pytest.raises(GraftError) as caught:
            call()
        assert caught.value.code == "GC091"
