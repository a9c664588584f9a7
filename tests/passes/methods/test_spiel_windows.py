"""SpIEL's windows: gradients of the base's weights, what is kept of them, and resumed training."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing import outputs_of, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import gradients_of, same_tensors
from tests.kit.models import fresh
from tests.passes.methods.spiel_models import batch, controller_of, entries_of, optimiser_for, spiel, train

VARIANTS = ("AG", "MA")


def wanted(compiled: Any) -> list[str]:
    """The names of the base's tensors that require a gradient."""
    return [name for name, p in compiled.named_parameters() if p.requires_grad and "graftc" not in name.split(".")]


def same_state(first: Any, second: Any) -> None:
    """Check that every tensor of the adaptation is equal to the bit."""
    expected, actual = first.adapter_state_dict(), second.adapter_state_dict()
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.full
def test_the_base_wants_gradients_in_windows_only() -> None:
    """Weights require gradients from a forward pass to `after_step`, so that between steps only trained tensors do."""
    compiled = fresh("llama", spiel())
    weights = {entries.region.tensor for entries in controller_of(compiled).entries}
    assert wanted(compiled) == []
    optimiser = optimiser_for(compiled)
    assert len(optimiser.param_groups[0]["params"]) == len(weights)
    compiled.train()
    for number in range(1, 8):
        loss = compiled(**batch(compiled, number)).loss
        assert set(wanted(compiled)) == (weights if number % 4 in (1, 2) else set())
        loss.backward()
        assert all(p.grad is None for n, p in compiled.named_parameters() if n in weights)
        optimiser.step()
        compiled.after_step()
        optimiser.zero_grad()
        assert wanted(compiled) == []
    assert all(not p.requires_grad for n, p in compiled.named_parameters() if n in weights)


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_no_training_wants_nothing(variant: str) -> None:
    """Eval mode, passes without gradients and the base alone require none, and do not affect the window around them."""
    plain, disturbed = fresh("llama", spiel(variant=variant)), fresh("llama", spiel(variant=variant))
    train(plain, optimiser_for(plain), range(1, 4))
    optimiser = optimiser_for(disturbed)
    for number in range(1, 4):
        torch.manual_seed(number)
        disturbed.train()
        loss = disturbed(**batch(disturbed, number)).loss
        for mode in ("eval", "no_grad", "disabled"):
            assert bool(wanted(disturbed)) == (variant == "AG" and mode == "eval" and number < 3)
            if mode == "eval":
                disturbed.eval()
                assert wanted(disturbed) == []
                disturbed(**batch(disturbed, 77)).loss.backward()
                disturbed.zero_grad()
                disturbed.train()
            elif mode == "no_grad":
                with torch.no_grad():
                    disturbed(**batch(disturbed, 78))
            else:
                with disturbed.disabled():
                    disturbed(**batch(disturbed, 79))
            assert wanted(disturbed) == []
        loss.backward()
        assert all(p.grad is None for n, p in disturbed.named_parameters() if "graftc" not in n)
        optimiser.step()
        disturbed.after_step()
        optimiser.zero_grad()
    same_state(plain, disturbed)


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("middle", [1, 2, 5])
def test_a_resumed_run_goes_on_to_the_bit(variant: str, middle: int) -> None:
    """The state dicts of model and optimiser suffice, within a window, at its end and outside."""
    uninterrupted = fresh("llama", spiel(variant=variant))
    optimiser = optimiser_for(uninterrupted)
    train(uninterrupted, optimiser, range(1, middle + 1))
    state, moments = copy.deepcopy(uninterrupted.state_dict()), copy.deepcopy(optimiser.state_dict())
    train(uninterrupted, optimiser, range(middle + 1, 8))
    resumed = fresh("llama", spiel(variant=variant))
    second = optimiser_for(resumed)
    resumed.load_state_dict(state)
    second.load_state_dict(moments)
    train(resumed, second, range(middle + 1, 8))
    same_state(uninterrupted, resumed)
    for a, b in zip(optimiser.state.values(), second.state.values(), strict=True):
        assert same_tensors(a, b)


@pytest.mark.slow
def test_state_that_is_loaded_between_steps_holds_at_once() -> None:
    """State that is loaded between steps applies at once, even if the model has been in another window before."""
    compiled = fresh("llama", spiel())
    optimiser = optimiser_for(compiled)
    state, moments = copy.deepcopy(compiled.state_dict()), copy.deepcopy(optimiser.state_dict())
    train(compiled, optimiser, range(1, 4))
    expected = copy.deepcopy(compiled.adapter_state_dict())
    train(compiled, optimiser, range(4, 6))
    compiled.load_state_dict(state)
    optimiser = optimiser_for(compiled)
    optimiser.load_state_dict(moments)
    train(compiled, optimiser, range(1, 4))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in compiled.adapter_state_dict().items())


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_an_artifact_from_within_a_window_changes_nothing(variant: str, tmp_path: Path) -> None:
    """Saving, loading and further training give the same state, even with a merge before the step is taken."""
    uninterrupted = fresh("llama", spiel(variant=variant))
    optimiser = optimiser_for(uninterrupted)
    train(uninterrupted, optimiser, [1])
    uninterrupted(**batch(uninterrupted, 2)).loss.backward()
    merged = uninterrupted.merge()
    assert merged.certificate.passed
    uninterrupted.save(tmp_path / "artifact")
    inputs = inputs_for(uninterrupted, seed=9)
    first = outputs_of(uninterrupted, inputs)
    uninterrupted.zero_grad()
    uninterrupted.skip_step()
    second = graftc.load(tmp_path / "artifact", tiny("llama"))
    assert same_bits(first, outputs_of(second, inputs))
    resumed = optimiser_for(second)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(uninterrupted, optimiser, range(2, 7))
    train(second, resumed, range(2, 7))
    same_state(uninterrupted, second)
    assert not any(p.requires_grad for p in merged.parameters())


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_changes_no_bit(variant: str) -> None:
    """Layers that run again in the backward pass deliver the same gradients, once."""
    plain, again = fresh("llama", spiel(variant=variant)), fresh("llama", spiel(variant=variant))
    again.gradient_checkpointing_enable()
    for compiled in (plain, again):
        train(compiled, optimiser_for(compiled), range(1, 8))
    same_state(plain, again)


@pytest.mark.slow
def test_no_gradient_of_a_weight_outlives_its_site() -> None:
    """When a gradient is delivered, earlier ones have been freed; only candidates and their sums remain."""
    compiled = fresh("llama", spiel(target={"modules": "**"}))
    controller, references, most = controller_of(compiled), [], 0
    original = controller._gather

    def watched(name: str, gradient: Tensor) -> None:
        nonlocal most
        assert gradient.shape == compiled.get_parameter(name).shape
        assert all(p.grad is None for n, p in compiled.named_parameters() if "graftc" not in n)
        most = max(most, sum(reference() is not None for reference in references))
        references.append(weakref.ref(gradient))
        original(name, gradient)

    controller._gradients._receive = watched
    compiled.train()
    gc.disable()
    try:
        compiled(**batch(compiled, 1)).loss.backward()
        assert len(references) == len(controller.entries) == 14
        assert most <= 1 and all(reference() is None for reference in references)
    finally:
        gc.enable()


@pytest.mark.full
def test_a_window_that_replaces_nothing_looks_at_nothing() -> None:
    """No gradients are required if no share is left, or if the training ends before."""
    for fields, steps in (({"drop_fraction": 0}, [5]), ({"total_steps": 6}, [5]), ({"total_steps": 7}, [])):
        compiled = fresh("llama", spiel(**fields))
        optimiser = optimiser_for(compiled)
        train(compiled, optimiser, range(1, 5))
        compiled(**batch(compiled, 5))
        assert bool(wanted(compiled)) == (not steps)


@pytest.mark.full
def test_a_layer_that_runs_several_times_gives_one_gradient() -> None:
    """ALBERT has one layer for all: the gradients of a weight's uses are summed before candidates are chosen."""
    from transformers import AlbertConfig, AlbertForSequenceClassification

    sizes = {"vocab_size": 101, "embedding_size": 16, "hidden_size": 32, "num_hidden_layers": 3}
    sizes |= {"num_attention_heads": 4, "intermediate_size": 48, "num_labels": 3, "classifier_dropout_prob": 0.0}
    torch.manual_seed(0)
    model = AlbertForSequenceClassification(AlbertConfig(**sizes, attn_implementation="eager"))
    entry = {"method": "spiel", "target": {"role": "attn.q"}, "density": 0.2, "total_steps": 100}
    compiled = graftc.compile({"adapt": [entry]}, model.eval())
    (entries,) = controller_of(compiled).entries
    compiled.train()
    inputs = {**inputs_for(compiled), "labels": torch.arange(5) % 3}
    compiled(**inputs).loss.backward()
    model.train()
    model(**inputs).loss.backward()
    dense = model.get_parameter(entries.region.tensor).grad.flatten()
    candidates = entries.tensor("candidates").long()
    assert torch.equal(candidates, dense.abs().topk(candidates.numel()).indices.sort().values)
    torch.testing.assert_close(entries.tensor("gradient"), dense[candidates], rtol=1e-4, atol=1e-8)


@pytest.mark.full
def test_parts_of_a_batch_are_one_step() -> None:
    """If the first part chooses the candidates of the full batch, as here with the same part twice, then sums, squares
    and grown entries are those of one batch, to a relative 1e-4. With other parts the first one chooses.
    """
    whole, parts = fresh("llama", spiel()), fresh("llama", spiel())
    first, second = optimiser_for(whole), optimiser_for(parts)
    for number in (1, 2):
        for compiled, optimiser, count in ((whole, first, 1), (parts, second, 2)):
            compiled.train()
            for _ in range(count):
                (compiled(**batch(compiled, number)).loss / count).backward()
            optimiser.step()
            if number == 1:
                compiled.after_step()
            optimiser.zero_grad()
    for one, two in zip(controller_of(whole).entries, controller_of(parts).entries, strict=True):
        assert torch.equal(one.tensor("candidates"), two.tensor("candidates"))
        for kind in ("sum", "square", "gradient"):
            torch.testing.assert_close(one.tensor(kind), two.tensor(kind), rtol=1e-4, atol=1e-9)
        assert one.tensor("gradient").any()
    for compiled in (whole, parts):
        compiled.after_step()
    for one, two in zip(controller_of(whole).entries, controller_of(parts).entries, strict=True):
        assert torch.equal(one.tensor("indices"), two.tensor("indices"))


@pytest.mark.full
def test_the_first_part_chooses_and_the_others_add() -> None:
    """By the gradients of full weights in the source model, candidates come from the first row, sums from all rows, and
    squares from the total sum.
    """
    compiled, model = fresh("llama", spiel()), tiny("llama").train()
    train(compiled, optimiser_for(compiled, lr=0.0), [1], micro=5)
    rows: list[dict[str, Tensor]] = []
    for i in range(5):
        model.zero_grad()
        (model(**batch(compiled, 1, slice(i, i + 1))).loss / 5).backward()
        rows.append(gradients_of(model))
    for entries in controller_of(compiled).entries:
        name, candidates = entries.region.tensor, entries.tensor("candidates").long()
        chosen = rows[0][name].abs().flatten().topk(candidates.numel()).indices
        assert torch.equal(candidates, chosen.sort().values)
        total = sum(row[name] for row in rows).flatten()[candidates]
        torch.testing.assert_close(entries.tensor("sum"), total, rtol=1e-3, atol=1e-7)
        torch.testing.assert_close(entries.tensor("square"), total**2, rtol=1e-3, atol=1e-9)
        assert not entries.tensor("gradient").any()


@pytest.mark.full
def test_a_step_that_is_thrown_away_leaves_nothing() -> None:
    """A step that a scaler skips chooses no candidates and adds nothing, in the first step of a window and later."""
    plain, skipped = fresh("llama", spiel()), fresh("llama", spiel())
    train(plain, optimiser_for(plain), range(1, 4))
    optimiser = optimiser_for(skipped)
    skipped.train()
    for number in range(1, 4):
        (skipped(**batch(skipped, 50 + number)).loss * torch.inf).backward()
        skipped.zero_grad()
        if number == 1:
            skipped.skip_step()
        else:
            from types import SimpleNamespace

            state = SimpleNamespace(max_steps=100, global_step=0)
            skipped.callback().on_optimizer_step(None, state, None, optimizer=SimpleNamespace(step_was_skipped=True))
        assert wanted(skipped) == []
        train(skipped, optimiser, [number])
    same_state(plain, skipped)


@pytest.mark.full
def test_a_copy_from_within_a_step_is_by_itself() -> None:
    """The copy's base requires no gradients; the copy has no optimiser and trains on independently, to the bit."""
    compiled = fresh("llama", spiel())
    optimiser = optimiser_for(compiled)
    train(compiled, optimiser, [1])
    compiled(**batch(compiled, 2)).loss.backward()
    copied = copy.deepcopy(compiled)
    assert wanted(copied) == [] and wanted(compiled)
    assert controller_of(copied).optimiser is None and controller_of(compiled).optimiser is optimiser
    compiled.zero_grad()
    compiled.skip_step()
    second = optimiser_for(copied)
    second.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(compiled, optimiser, range(2, 8))
    frozen = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
    train(copied, second, range(2, 8))
    same_state(compiled, copied)
    assert all(torch.equal(tensor, frozen[name]) for name, tensor in compiled.adapter_state_dict().items())


@pytest.mark.slow
def test_an_adaptation_that_does_not_train_is_left_alone() -> None:
    """With `train_only` for another adaptation, no gradients are read and no entry moves."""
    spiel = {"method": "spiel", "target": {"role": "attn.q"}, "density": 0.1, "interval": 4, "accumulation_steps": 2}
    lora = {"method": "lora", "target": {"role": "attn.v"}}
    compiled = graftc.compile({"adapt": [{**spiel, "total_steps": 40}, lora]}, tiny("llama"))
    compiled.train_only("lora")
    before = {name: entries.tensor("indices").clone() for name, entries in entries_of(compiled).items()}
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=1e-2)
    compiled.train()
    compiled(**batch(compiled, 1)).loss.backward()
    assert wanted(compiled) == []
    train(compiled, optimiser, range(1, 4))
    assert all(torch.equal(before[name], entries.tensor("indices")) for name, entries in entries_of(compiled).items())


@pytest.mark.full
def test_state_moves_with_the_model() -> None:
    """The state that a window has gathered is on the same device as the deltas."""
    compiled = fresh("llama", spiel())
    compiled(**batch(compiled, 1))
    compiled.to("meta")
    assert {tensor.device.type for tensor in compiled.adapter_state_dict().values()} == {"meta"}
    assert all(e.tensor("candidates").device.type == "meta" for e in controller_of(compiled).entries)


@pytest.mark.full
def test_compiled_code_trains_without_windows() -> None:
    """Compiled code trains without errors; no entry is added, and a warning says so."""
    compiled = fresh("llama", spiel())
    optimiser = optimiser_for(compiled)
    compiled.train()
    compiled(**batch(compiled, 0))
    compiled.eval().train()
    fast = torch.compile(compiled, backend="aot_eager")
    with pytest.warns(graftc.GraftWarning, match=r"GC025.*no weight gradients"):
        for number in range(1, 4):
            fast(**batch(compiled, number)).loss.backward()
            assert wanted(compiled) == []
            optimiser.step()
            compiled.after_step()
            optimiser.zero_grad()
    assert all(entries.tensor("delta").any() for entries in controller_of(compiled).entries)


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_trainer_goes_on_where_it_stopped(variant: str, tmp_path: Path) -> None:
    """With the callback and our optimiser, a run from a checkpoint in a window equals an uninterrupted one, with
    clipped gradients and two micro-batches per step.
    """
    from transformers import Trainer, TrainingArguments

    def trainer(folder: str) -> Any:
        compiled = fresh("bert", spiel(variant=variant, total_steps=None))
        ids = torch.randint(3, 100, (32, 8), generator=torch.Generator().manual_seed(0))
        data = [{"input_ids": row, "attention_mask": torch.ones(8).long(), "labels": row[0] % 3} for row in ids]
        settings = {"num_train_epochs": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
        settings |= {"save_strategy": "steps", "save_steps": 5, "report_to": [], "disable_tqdm": True, "use_cpu": True}
        arguments = TrainingArguments(str(tmp_path / folder), lr_scheduler_type="linear", **settings)
        return Trainer(
            model=compiled,
            args=arguments,
            train_dataset=data,
            callbacks=[compiled.callback()],
            optimizers=(optimiser_for(compiled, lr=5e-3), None),
        )

    whole = trainer("whole")
    start = {n: t.clone() for n, t in whole.model.adapter_state_dict().items() if n.endswith("_indices")}
    whole.train()
    state = whole.model.adapter_state_dict()
    assert all(not torch.equal(state[name], tensor) for name, tensor in start.items())
    assert controller_of(whole.model).steps == controller_of(whole.model).total == 12
    resumed = trainer("resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    same_state(whole.model, resumed.model)
