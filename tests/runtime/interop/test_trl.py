"""TRL's trainers over compiled models, a few steps each; `tests/gates/test_trl.py` has long runs and a real model."""

from __future__ import annotations

import gc
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.models import fresh
from tests.runtime.interop.trl_runs import LORA, both, dpo, grpo, kto, logged, reward, rloo, scoring, sft

pytest.importorskip("trl")
STEPS = 4


def referring(trainer: Any, **changes: Any) -> Any:
    """Return a factory of trainers that passes the reference of a compiled model; peft's model is its own."""

    def trainer_of(model: Any, folder: Path) -> Any:
        reference = model.reference() if isinstance(model, Compiled) else None
        return trainer(model, folder, reference, max_steps=STEPS, **changes)

    return trainer_of


RUNS: dict[str, Any] = {
    "packed": lambda model, folder: sft(model, folder, max_steps=STEPS, packing=True),
    "padded": lambda model, folder: sft(model, folder, max_steps=STEPS),
    "smoothed": lambda model, folder: sft(model, folder, max_steps=STEPS, label_smoothing_factor=0.1),
    "dft": lambda model, folder: sft(model, folder, max_steps=STEPS, loss_type="dft"),
    "with noise": lambda model, folder: sft(model, folder, max_steps=STEPS, neftune_noise_alpha=5.0),
    "recomputed": lambda model, folder: sft(model, folder, max_steps=STEPS, gradient_checkpointing=True),
    "dpo": referring(dpo),
    "dpo precomputed": referring(dpo, precompute_ref_log_probs=True),
    "kto": referring(kto),
    "reward": lambda model, folder: reward(model, folder, max_steps=STEPS),
}


@pytest.mark.full
@pytest.mark.parametrize("run", RUNS)
def test_steps_are_those_of_peft(run: str, tmp_path: Path) -> None:
    runs = both(RUNS[run], tmp_path, scoring() if run == "reward" else None)
    assert runs.losses() < 1e-5 and runs.tensors() < 1e-4


@pytest.mark.full
def test_the_reference_of_preferences_is_the_base_and_no_second_one_is_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = fresh("llama", LORA.adaptation, seed=0)
    source = compiled.compilation.source.eval()
    sizes = {tuple(p.shape) for p in source.parameters() if p.dim() == 2}

    def alive() -> set[int]:
        gc.collect()
        tensors = (o for o in gc.get_objects() if type(o) in (Tensor, nn.Parameter) and tuple(o.shape) in sizes)
        return {t.untyped_storage().data_ptr() for t in tensors if not t.is_meta}

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was copied or loaded")

    before = alive()
    with monkeypatch.context() as patch:
        patch.setattr(nn.Parameter, "__deepcopy__", refuse)
        patch.setattr("trl.trainer.dpo_trainer.create_model_from_path", refuse)
        trainer = dpo(compiled, tmp_path, compiled.reference(), max_steps=STEPS)
        trainer.train()
    compiled.zero_grad()
    assert alive() <= before
    batch = next(iter(trainer.get_train_dataloader()))
    reference = torch.cat(trainer.compute_ref_log_probs(trainer.ref_model, batch))
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        scores = source(input_ids=ids, attention_mask=mask).logits[:, :-1].log_softmax(-1)
    each = scores.gather(-1, ids[:, 1:, None])[..., 0] * batch["completion_mask"][:, 1:]
    assert torch.allclose(reference, each.sum(1), rtol=1e-5)
    own = torch.cat(trainer.compute_ref_log_probs(trainer.model, batch))
    assert not torch.allclose(own, reference, rtol=1e-3), "the model has been trained"


@pytest.mark.full
@pytest.mark.parametrize("precomputed", [False, True])
def test_a_trained_adapter_goes_on_from_the_base_or_from_itself(precomputed: bool, tmp_path: Path) -> None:
    compiled = fresh("llama", LORA.adaptation, seed=0)
    perturb(compiled, 0.1)
    reference = None if precomputed else compiled.reference()
    trainer = dpo(compiled, tmp_path, reference, max_steps=STEPS, precompute_ref_log_probs=precomputed)
    trainer.train()
    same = logged(trainer, "loss")[0] == pytest.approx(math.log(2), rel=1e-5)
    assert same == precomputed, "the first step's policy and reference are one only if the model was its own"


@pytest.mark.full
def test_dropout_is_switched_off_where_a_trainer_says_so(tmp_path: Path) -> None:
    compiled = fresh("llama", {**LORA.adaptation, "dropout": 0.5}, seed=0)
    trainer = dpo(compiled, tmp_path, compiled.reference(), max_steps=STEPS, learning_rate=0.0)
    assert trainer.args.disable_dropout
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict().values():
            tensor.add_(0.1)
        batch = next(iter(trainer.get_train_dataloader()))
        compiled.train()
        losses = [trainer.compute_loss(compiled, batch) for _ in range(3)]
        compiled.eval()
        expected = trainer.compute_loss(compiled, batch)
    assert all(torch.equal(loss, expected) for loss in losses)


@pytest.mark.full
def test_attention_is_kept_where_a_trainer_recomputes_the_rest(tmp_path: Path) -> None:
    """Selective recomputation keeps attention; peft's models fail with this option of TRL."""
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"selective": True}}
    runs = [
        sft(fresh("llama", LORA.adaptation, seed=0), tmp_path, max_steps=STEPS, **changes) for changes in ({}, options)
    ]
    for run in runs:
        run.train()
    plain, kept = (logged(run, "loss") for run in runs)
    assert kept == pytest.approx(plain, rel=1e-6)
    recompute, _ = runs[1].model._graftc.recompute
    assert "context_fn" in recompute.options


@pytest.mark.slow
def test_a_head_that_trains_learns(tmp_path: Path) -> None:
    compiled = fresh("llama", LORA.adaptation, seed=0, train=["lm_head"])
    before = compiled.get_parameter("lm_head.graftc.trained.weight").detach().clone()
    sft(compiled, tmp_path, max_steps=STEPS).train()
    assert not torch.equal(compiled.get_parameter("lm_head.graftc.trained.weight"), before)


@pytest.mark.full
def test_a_head_that_is_no_sum_of_products_is_refused(tmp_path: Path) -> None:
    compiled = fresh("llama", {"method": "dora", "target": {"role": ["attn.q", "head"]}}, seed=0)
    with pytest.raises(GraftError, match="GC072: the head lm_head is adapted by 'dora'"):
        sft(compiled, tmp_path, max_steps=STEPS).train()


@pytest.mark.full
@pytest.mark.parametrize("head", [False, True], ids=["as it is", "adapted"])
def test_losses_and_metrics_are_those_of_trls_own_forward(head: bool) -> None:
    """Losses and metrics equal TRL's own; with an adapted head, whose weight TRL lacks, the loss equals the model's."""
    from trl.trainer.utils import add_fused_lm_head

    compiled = fresh("llama", {"method": "lora", "target": {"role": ["attn.q", *(["head"] if head else [])]}}, seed=0)
    with torch.no_grad():
        for tensor in compiled.adapter_state_dict().values():
            tensor.add_(0.1)
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids, "labels": ids.masked_fill(torch.arange(9) < 4, -100)}
    plain = compiled.train()(**batch).loss
    add_fused_lm_head(compiled, outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"))
    outputs = compiled(**batch, fused_lm_head=True)
    torch.testing.assert_close(outputs.loss, plain)
    if not head:
        theirs = compiled.forward.__wrapped__(**batch, fused_lm_head=True)
        assert list(outputs) == list(theirs)
        for name in theirs:
            torch.testing.assert_close(outputs[name], theirs[name], rtol=1e-5, atol=1e-5)
        own = [p for p in compiled.parameters() if p.requires_grad]
        for mine, other in zip(*(torch.autograd.grad(o.loss, own) for o in (outputs, theirs)), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
    counted = compiled(**batch, fused_lm_head=True, num_items_in_batch=torch.tensor(20))
    torch.testing.assert_close(counted.loss, plain * outputs.label_mask.sum() / 20)


@pytest.mark.slow
def test_entropies_of_an_objective_are_left_to_trl() -> None:
    """TRL computes entropies, which have gradients, and probabilities at another temperature."""
    from trl.trainer.utils import add_fused_lm_head

    for options in ({"outputs": ("log_probs", "entropy")}, {"temperature": 0.7}, {"cast_lm_head_to_fp32": True}):
        compiled = fresh("llama", LORA.adaptation, seed=0)
        add_fused_lm_head(compiled, **options)
        assert hasattr(compiled.forward, "__func__"), "it is TRL's own"


@pytest.mark.full
def test_a_checkpoint_is_resumed_and_loaded(tmp_path: Path) -> None:
    settings = {"max_steps": STEPS, "save_strategy": "steps", "save_steps": STEPS // 2}
    whole = sft(fresh("llama", LORA.adaptation, seed=0), tmp_path, **settings)
    whole.train()
    resumed = sft(fresh("llama", LORA.adaptation, seed=0), tmp_path, **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{STEPS // 2}"))
    expected = whole.model.adapter_state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in resumed.model.adapter_state_dict().items())
    loaded: Any = graftc.load(tmp_path / f"checkpoint-{STEPS}", tiny("llama"))
    assert all(torch.equal(t, expected[n]) for n, t in loaded.adapter_state_dict().items())
    assert len(logged(resumed, "loss")) == STEPS and "trl" in whole.model.model_tags
    assert (tmp_path / f"checkpoint-{STEPS}" / "README.md").is_file() or (tmp_path / "README.md").is_file()


def alone(trainer: Any, **changes: Any) -> Any:
    """Return a factory of trainers created by the compiled model, which adds the reference; peft's model is its own."""

    def trainer_of(model: Any, folder: Path) -> Any:
        if not isinstance(model, Compiled):
            return trainer(model, folder, max_steps=2, **changes)
        return trainer(model, folder, max_steps=2, make=model.trainer, **changes)

    return trainer_of


REFERRING: dict[str, Any] = {
    "dpo": alone(dpo),
    "dpo precomputed": alone(dpo, precompute_ref_log_probs=True),
    "kto": alone(kto),
    "grpo": alone(grpo, beta=0.1, learning_rate=1e-2),
    "rloo": alone(rloo, beta=0.1, learning_rate=1e-2),
}


@pytest.mark.full
@pytest.mark.slow
@pytest.mark.sample("grpo")
@pytest.mark.parametrize("run", REFERRING)
def test_a_reference_is_found_for_a_base_in_memory(run: str, tmp_path: Path) -> None:
    """Losses and factors equal those in peft, whose model is its own reference, and no second model is loaded."""
    runs = both(REFERRING[run], tmp_path)
    key = "kl" if run in ("grpo", "rloo") else "loss"
    values, expected = logged(runs.ours, key), logged(runs.theirs, key)
    assert len(values) == 2 and values == pytest.approx(expected, rel=1e-4, abs=1e-6)
    assert runs.tensors() < 1e-4
    assert runs.ours.args.model_init_kwargs == runs.theirs.args.model_init_kwargs


@pytest.mark.parametrize("trainer", [sft, dpo])
def test_a_config_of_peft_beside_a_compiled_model(trainer: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = fresh("llama", LORA.adaptation, seed=0)
    with pytest.raises(GraftError, match=r"graftc\.compile") as caught:
        trainer(model, tmp_path, peft_config=peft.LoraConfig(task_type="CAUSAL_LM"))
    assert caught.value.code == "GC072"
