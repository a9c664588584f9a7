"""Controllers and objectives in a plain loop: counted, missed, moved, saved and resumed."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny

TARGET = {"role": ["attn.q", "ffn.down"]}
ADALORA = {"method": "adalora", "target": TARGET, "rank": 4, "target_rank": 2, "final_steps": 2, "dropout": 0.1}
SORA = {"method": "sora", "target": TARGET, "rank": 4, "threshold": 0.02, "l1": 0.1, "dropout": 0.1}
DYLORA = {"method": "dylora", "target": TARGET, "rank": 4, "dropout": 0.1}
METHODS = {"adalora": ADALORA, "sora": SORA, "dylora": DYLORA}
TOTAL = 8


def adapted(*entries: Any) -> Any:
    """A tiny BERT with dropout of its own."""
    return graftc.compile({"adapt": list(entries)}, tiny("bert"), seed=0)


def optimiser_for(compiled: Any) -> torch.optim.Optimizer:
    """Return AdamW for the trained parameters."""
    return torch.optim.AdamW([p for p in compiled.parameters() if p.requires_grad], lr=5e-3)


def train(compiled: Any, optimiser: Any, steps: range, *, extra: bool = True, after: bool = True) -> None:
    """Do the steps of these numbers, each with a batch and a seed of its own."""
    compiled.train()
    for number in steps:
        torch.manual_seed(number)
        loss = compiled(**inputs_for(compiled, seed=number), labels=torch.arange(5) % 3).loss
        (loss + compiled.extra_loss() if extra else loss).backward()
        optimiser.step()
        if after:
            compiled.after_step()
        optimiser.zero_grad()


@contextmanager
def no_warning() -> Iterator[None]:
    """Turn warnings of graftc into errors while the block runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        yield


@pytest.mark.full
@pytest.mark.parametrize("method", ["sora", *(m for m in METHODS if m != "sora")])
def test_an_artifact_in_the_middle_of_training_changes_nothing(method: str, tmp_path: Path) -> None:
    """After saving, loading and continuing, parameters and state are, bit for bit, those of an uninterrupted run."""
    whole = adapted(METHODS[method])
    whole.begin(TOTAL)
    train(whole, optimiser_for(whole), range(TOTAL))
    for middle in (3, 7):
        first = adapted(METHODS[method])
        first.begin(TOTAL)
        optimiser = optimiser_for(first)
        train(first, optimiser, range(middle))
        first.save(tmp_path / f"artifact{middle}")
        second = graftc.load(tmp_path / f"artifact{middle}", tiny("bert"))
        second.begin(TOTAL)
        resumed = optimiser_for(second)
        resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
        train(second, resumed, range(middle, TOTAL))
        expected, tensors = whole.adapter_state_dict(), second.adapter_state_dict()
        assert expected.keys() == tensors.keys()
        for name, tensor in expected.items():
            assert torch.equal(tensors[name], tensor), name


@pytest.mark.full
def test_two_adaptations_are_steered_side_by_side() -> None:
    """Each adaptation has its own counter, and their objectives add up."""
    both = adapted({**ADALORA, "target": {"role": "attn.q"}}, {**SORA, "target": {"role": "ffn.down"}})
    alone = [
        adapted({**ADALORA, "target": {"role": "attn.q"}}),
        adapted({**SORA, "target": {"role": "ffn.down"}}),
    ]
    assert abs(both.extra_loss().item() - sum(one.extra_loss().item() for one in alone)) < 1e-6
    both.begin(TOTAL)
    train(both, optimiser_for(both), range(3))
    state = both.adapter_state_dict()
    assert state["graftc.adalora.step"].tolist() == state["graftc.sora.step"].tolist() == [3]


@pytest.mark.slow
def test_without_steering_there_is_nothing_to_do() -> None:
    """With LoRA, every call exists and changes nothing."""
    compiled = adapted({"method": "lora", "target": TARGET})
    with no_warning():
        compiled.begin(3)
        train(compiled, optimiser_for(compiled), range(2))
        assert compiled.extra_loss().item() == 0 and not compiled.extra_loss().requires_grad
        compiled.warn_of_unsteered()


@pytest.mark.slow
def test_state_moves_with_the_model() -> None:
    """Counters, importance and the deployed rank are on the parameters' device, where controllers find them."""
    compiled = adapted(ADALORA, {**SORA, "target": {"role": "ffn.up"}}, {**DYLORA, "target": {"role": "attn.v"}})
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
    compiled = adapted(ADALORA)
    compiled.begin(TOTAL)
    train(compiled, optimiser_for(compiled), range(3))
    other = adapted(ADALORA)
    other.load_state_dict(compiled.state_dict())
    assert all(torch.equal(other.adapter_state_dict()[n], t) for n, t in compiled.adapter_state_dict().items())
    (controller,) = other.steering.controllers.values()
    assert controller.steps == 3


@pytest.mark.full
def test_steps_left_counts_from_now() -> None:
    """The total that a schedule sees is the sum of the past and the remaining steps."""
    compiled = adapted(ADALORA)
    compiled.begin(100)
    train(compiled, optimiser_for(compiled), range(3))
    compiled.steps_left(5)
    (controller,) = compiled.steering.controllers.values()
    assert controller.total == 8


@pytest.mark.full
def test_an_objective_that_is_left_out() -> None:
    """The first step that lacks it warns with GC025, once."""
    compiled = adapted(ADALORA)
    compiled.begin(TOTAL)
    optimiser = optimiser_for(compiled)
    with pytest.warns(GraftWarning, match="GC025.*'adalora' has an objective") as caught:
        train(compiled, optimiser, range(3), extra=False)
    assert len([w for w in caught if isinstance(w.message, GraftWarning)]) == 1
    assert "extra_loss" in (caught[0].message.hint or "")


@pytest.mark.full
def test_an_objective_that_is_left_out_later() -> None:
    """An objective that is left out only after some steps warns as well."""
    compiled = adapted(ADALORA)
    compiled.begin(TOTAL)
    optimiser = optimiser_for(compiled)
    with no_warning():
        train(compiled, optimiser, range(2))
    with pytest.warns(GraftWarning, match="GC025"):
        train(compiled, optimiser, range(2, 3), extra=False)


@pytest.mark.full
@pytest.mark.parametrize("ending", ["merge", "save", "warn_of_unsteered"])
def test_a_controller_that_never_stepped(ending: str, tmp_path: Path) -> None:
    """Using the result warns with GC025, though gradients have been zeroed by then."""
    compiled = adapted(SORA)
    train(compiled, optimiser_for(compiled), range(2), after=False)
    with pytest.warns(GraftWarning, match="GC025.*'sora' was trained without"):
        getattr(compiled, ending)(*([tmp_path / "artifact"] if ending == "save" else []))


@pytest.mark.full
def test_an_objective_that_was_never_used() -> None:
    """An objective that was not used warns even if `after_step` is not called."""
    compiled = adapted({**SORA, "threshold": 0})
    train(compiled, optimiser_for(compiled), range(1), extra=False, after=False)
    with pytest.warns(GraftWarning, match="GC025.*'sora' has an objective"):
        compiled.merge()


@pytest.mark.full
def test_no_warning_where_nothing_is_missed(tmp_path: Path) -> None:
    """Untrained models, values that were set, proper steering and an artifact of it cause no warning."""
    with no_warning():
        compiled = adapted(ADALORA)
        compiled.merge(allow_unchanged=True)
        perturb(compiled)
        compiled.merge()
        compiled = adapted(ADALORA)
        compiled.begin(TOTAL)
        train(compiled, optimiser_for(compiled), range(TOTAL))
        compiled.save(tmp_path / "artifact")
        graftc.load(tmp_path / "artifact", tiny("bert")).merge()


@pytest.mark.slow
def test_names_that_are_none() -> None:
    """Calls that take the name of an adaptation raise GC091."""
    compiled = adapted(SORA)
    for call in (lambda: compiled.rank_pattern("x"), lambda: compiled.deploy_rank("x", 1)):
        with pytest.raises(GraftError) as caught:
            call()
        assert caught.value.code == "GC091"
