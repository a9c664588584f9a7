"""Common uses of the Trainer: each works, or is refused with a coded error that names a way out."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import bert
from tests.kit.comparing import trainable
from tests.kit.models import fresh
from tests.runtime.training.test_trainer import examples

STEPS = 3
DATA = examples(24)


def seeded() -> Any:
    torch.manual_seed(11)
    base = bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return fresh(base, {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}}, train=["classifier"])


def trainer(folder: Path, model: Any = None, cls: Any = None, rest: Any = None, **changes: Any) -> Any:
    """Return a trainer of a few steps; ``rest`` are its own arguments, ``changes`` those of `TrainingArguments`."""
    from transformers import Trainer, TrainingArguments

    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "learning_rate": 5e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 7,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **changes})
    kind, model = cls or Trainer, model if model is not None else seeded()
    return kind(model=model, args=arguments, train_dataset=DATA, eval_dataset=DATA[:8], **(rest or {}))


def losses(run: Any) -> list[float]:
    run.train()
    values = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(values) == run.state.global_step > 0
    return values


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """The losses of a run without changes."""
    return losses(trainer(tmp_path_factory.mktemp("plain")))


def compute_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    return nn.functional.cross_entropy(outputs.logits, labels)


SAME: dict[str, dict[str, Any]] = {
    "average_tokens_across_devices": {"average_tokens_across_devices": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "torch_compile": {"torch_compile": True, "torch_compile_backend": "eager"},
    "a loss of one's own": {"rest": {"compute_loss_func": compute_loss}},
}
"""Changes that make no difference to the losses."""


@pytest.mark.full
@pytest.mark.parametrize("habit", SAME)
def test_losses_stay_as_they_are(habit: str, plain: list[float], tmp_path: Path) -> None:
    assert losses(trainer(tmp_path, **SAME[habit])) == pytest.approx(plain, rel=1e-5)


OTHER: dict[str, dict[str, Any]] = {
    "label smoothing": {"label_smoothing_factor": 0.2},
    "noise": {"neftune_noise_alpha": 5.0},
    "accumulation": {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2},
}
"""Changes that make one, as they do to the source model that is trained in the same way."""


@pytest.mark.full
@pytest.mark.parametrize("habit", OTHER)
def test_the_first_loss_is_that_of_the_source_model(habit: str, plain: list[float], tmp_path: Path) -> None:
    """Adaptations change nothing before the first step."""
    ours = losses(trainer(tmp_path, **OTHER[habit]))
    source = seeded().compilation.source
    expected = losses(trainer(tmp_path, source, **OTHER[habit]))
    assert ours[0] == pytest.approx(expected[0], rel=1e-5) and ours[0] != pytest.approx(plain[0], rel=1e-5)


@pytest.mark.slow
def test_texts_are_drawn_by_length(tmp_path: Path) -> None:
    rows = [{**row, **{n: row[n][: 3 + k % 5] for n in ("input_ids", "attention_mask")}} for k, row in enumerate(DATA)]

    def padded(batch: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        pad = nn.utils.rnn.pad_sequence
        inputs = {n: pad([row[n] for row in batch], batch_first=True) for n in ("input_ids", "attention_mask")}
        return {**inputs, "labels": torch.stack([row["labels"] for row in batch])}

    run = trainer(tmp_path, rest={"data_collator": padded}, train_sampling_strategy="group_by_length")
    run.train_dataset = rows
    losses(run)
    assert len(run.model.compilation.signatures) <= 2, "lengths are not constants of a graph"


@pytest.mark.full
def test_batches_that_are_too_large_are_halved(tmp_path: Path) -> None:
    from transformers import Trainer

    class Small(Trainer):
        def training_step(self, model: nn.Module, inputs: Any, *rest: Any, **options: Any) -> Tensor:
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory. Tried to allocate")
            loss: Tensor = super().training_step(model, inputs, *rest, **options)
            return loss

    run = trainer(tmp_path, cls=Small, auto_find_batch_size=True)
    losses(run)
    assert run._train_batch_size <= 2


@pytest.mark.slow
def test_it_stops_early_and_keeps_few_checkpoints(tmp_path: Path) -> None:
    from transformers import EarlyStoppingCallback

    run = trainer(
        tmp_path,
        rest={"callbacks": [EarlyStoppingCallback(1)]},
        max_steps=20,
        learning_rate=10.0,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=1,
        save_steps=1,
        save_total_limit=1,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
    )
    losses(run)
    assert run.state.global_step < 20 and len([*tmp_path.glob("checkpoint-*")]) <= 2
    best = min(entry["eval_loss"] for entry in run.state.log_history if "eval_loss" in entry)
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)


@pytest.mark.slow
def test_it_predicts(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    losses(run)
    predictions = run.predict(DATA[:5]).predictions
    ids = torch.stack([row["input_ids"] for row in DATA[:5]])
    with torch.no_grad():
        expected = run.model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    assert torch.allclose(torch.from_numpy(predictions), expected, atol=1e-5)


@pytest.mark.full
def test_a_folder_is_what_is_pushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no hub here, so the test looks at what would be uploaded."""
    uploaded: list[Path] = []

    class Repository:
        repo_id = "someone/adapter"

    def upload(*_: Any, folder_path: str, **__: Any) -> None:
        uploaded.append(Path(folder_path))

    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", lambda *_, **__: Repository)
    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    run = trainer(tmp_path)
    losses(run)
    run.push_to_hub()
    assert uploaded == [tmp_path] and (tmp_path / "README.md").is_file()
    loaded: Any = graftc.load(tmp_path, seeded().compilation.source)
    expected = run.model.adapter_state_dict()
    assert all(torch.equal(t, expected[n]) for n, t in loaded.adapter_state_dict().items())


@pytest.mark.full
def test_what_is_frozen_by_hand_stays_and_states_go_both_ways(tmp_path: Path) -> None:
    model = seeded()
    frozen = [n for n, p in model.named_parameters() if p.requires_grad and n.endswith(".A")]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    copied, before = copy.deepcopy(model), {n: t.clone() for n, t in model.adapter_state_dict().items()}
    losses(trainer(tmp_path, model, weight_decay=0.1))
    after = model.adapter_state_dict()
    assert frozen and {n for n in before if torch.equal(before[n], after[n])} == set(frozen)
    assert all(torch.equal(t, before[n]) for n, t in copied.adapter_state_dict().items())
    copied.load_state_dict(model.state_dict())
    assert all(torch.equal(t, after[n]) for n, t in copied.adapter_state_dict().items())


@pytest.mark.slow
def test_groups_of_an_optimiser_of_ones_own_train(tmp_path: Path) -> None:
    model = seeded()
    named = trainable(model)
    still = [p for n, p in named.items() if n.endswith(".A")]
    moves = [p for n, p in named.items() if not n.endswith(".A")]
    before = {n: p.detach().clone() for n, p in named.items()}
    groups: Any = [{"params": still, "lr": 0.0, "weight_decay": 0.0}, {"params": moves, "lr": 1e-2}]
    losses(trainer(tmp_path, model, rest={"optimizers": (torch.optim.AdamW(groups), None)}))
    assert {n for n, p in named.items() if torch.equal(p, before[n])} == {n for n in named if n.endswith(".A")}


REFUSED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "reentrant": (
        r"GC072: reentrant checkpointing \(use_reentrant=True\) is not supported",
        lambda folder: trainer(
            folder, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": True}
        ).train(),
    ),
    "evaluation in 16 bits": (
        "GC033: the graphs were captured in torch.float32 and cannot run in torch.bfloat16",
        lambda folder: trainer(folder, bf16_full_eval=True).evaluate(),
    ),
    "push_to_hub of the model": ("GC072: .* has no push_to_hub", lambda folder: seeded().push_to_hub("name")),
}


@pytest.mark.full
@pytest.mark.parametrize("habit", REFUSED)
def test_what_does_not_work_says_so(habit: str, tmp_path: Path) -> None:
    pattern, run = REFUSED[habit]
    with pytest.raises(GraftError, match=pattern) as error:
        run(tmp_path)
    assert error.value.hint


@pytest.mark.full
def test_deepspeed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeepSpeed is not installed here, so its hook and Accelerate's record of it are imitated."""
    from accelerate.state import AcceleratorState

    compiled = seeded()

    def hook(*_: Any) -> None: ...

    hook.__module__ = "deepspeed.runtime.zero.parameter_offload"
    with pytest.raises(GraftError, match="GC072: a compiled model cannot be trained with DeepSpeed"):
        compiled.classifier.register_forward_hook(hook)
    monkeypatch.setitem(AcceleratorState._shared_state, "deepspeed_plugins", {"default": object()})
    with pytest.raises(GraftError, match="GC072: a compiled model cannot be trained with DeepSpeed"):
        compiled(input_ids=DATA[0]["input_ids"][None])
