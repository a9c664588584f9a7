"""`memory: {loss: chunked}` gives the losses and gradients of whole logits, on every family and adapted heads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing import tiny
from graftc.testing.families import _COMMON, VOCABULARY
from graftc.testing.perturbing import randomise
from tests.kit.settings import small_chunks
from tests.runtime.activations.test_chunked_loss import CALL, IDS, LABELS, LORA, assert_equal, step, with_loss

pytestmark = pytest.mark.gate


@pytest.fixture(autouse=True)
def chunks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


def _built(name: str, **changes: Any) -> nn.Module:
    import transformers

    own = {"vocab_size": VOCABULARY, "num_key_value_heads": 2, **changes}
    config = getattr(transformers, f"{name.partition('For')[0]}Config")(**{**_COMMON, **own})
    return randomise(getattr(transformers, name)(config), seed=0).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    **{name: lambda name=name: tiny(name) for name in ("llama", "gpt2", "gpt_neox", "mixtral", "t5")},  # type: ignore[misc]
    "bert": lambda: _built("BertForMaskedLM"),
    "gemma2": lambda: _built("Gemma2ForCausalLM", head_dim=12),
    "opt": lambda: _built("OPTForCausalLM", ffn_dim=80, word_embed_proj_dim=48, max_position_embeddings=64),
    "qwen2": lambda: _built("Qwen2ForCausalLM"),
    "granite": lambda: _built("GraniteForCausalLM", logits_scaling=2.0),
    "bart": lambda: _built("BartForConditionalGeneration", d_model=48, encoder_layers=1, decoder_layers=1),
}


def in_float64(model: nn.Module) -> nn.Module:
    """Return a model whose loss is in float64; transformers' own loss casts logits to float32."""

    def loss(
        logits: Tensor, labels: Tensor | None, vocab_size: int, shift_labels: Any = None, **options: Any
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = functional.pad(labels, (0, 1), value=-100)[..., 1:]
        count = options.get("num_items_in_batch")
        flat = logits.view(-1, vocab_size), shift_labels.reshape(-1)
        value = functional.cross_entropy(*flat, reduction="mean" if count is None else "sum")
        return value if count is None else value / count

    if hasattr(model, "loss_function"):
        model.loss_function = loss  # type: ignore[assignment]
    return model.double()


def assert_chunked(compiled: Compiled) -> None:
    with torch.no_grad():
        assert "logits" not in compiled(**CALL)


@pytest.mark.parametrize("family", MODELS)
def test_losses_and_gradients_are_those_of_whole_logits(family: str) -> None:
    model = MODELS[family]()
    chunked = with_loss(model, "chunked")
    assert_chunked(chunked)
    assert_equal(step(chunked), step(with_loss(model, "whole")), 1e-5)
    model = in_float64(model)
    assert_equal(step(with_loss(model, "chunked")), step(with_loss(model, "whole")), 1e-10)


HEADS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"adapt": [LORA, {**LORA, "name": "head", "target": {"modules": "lm_head"}, "dropout": 0.1}]}),
    "loha": ("llama", {"adapt": [LORA, {"method": "loha", "rank": 2, "target": {"modules": "lm_head"}}]}),
    "trained": ("llama", {"train": ["lm_head"]}),
    "tokens": ("llama", {"tokens": {"add": ["<a>", "<b>"]}}),
    "tied tokens": ("gpt2", {"tokens": {"add": ["<a>", "<b>"]}}),
}


@pytest.mark.parametrize("head", HEADS)
def test_adapted_heads_are_computed_in_chunks(head: str) -> None:
    family, spec = HEADS[head]
    model = in_float64(tiny(family))
    call = {**CALL, "input_ids": IDS.clone()}
    if "tokens" in spec:
        call["input_ids"][:, 1::3] = VOCABULARY + 1
        call["labels"] = torch.where(call["labels"] % 3 == 1, VOCABULARY, call["labels"])
    chunked = with_loss(model, "chunked", call, **spec)
    assert_chunked(chunked)
    assert_equal(step(chunked, call), step(with_loss(model, "whole", call, **spec), call), 1e-10)


def test_counts_and_labels_that_are_shifted_already() -> None:
    model = in_float64(tiny("llama"))
    call = {**CALL, "num_items_in_batch": torch.tensor(13), "shift_labels": LABELS.roll(-1, 1)}
    assert_equal(step(with_loss(model, "chunked", call), call), step(with_loss(model, "whole", call), call), 1e-10)


def test_torch_compile_takes_the_whole_graph() -> None:
    compiled = with_loss(tiny("llama"), "chunked")
    expected = step(compiled)
    assert_equal(step(torch.compile(compiled, fullgraph=True, backend="aot_eager")), _renamed(expected), 1e-5)  # type: ignore[arg-type]


def _renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name == "loss" else f"_orig_mod.{name}": tensor for name, tensor in tensors.items()}


def test_checkpointing_and_autocast_work_with_it() -> None:
    model = tiny("llama")
    expected = step(with_loss(model, "whole"))
    assert_equal(step(with_loss(model, "chunked", checkpoint="layers")), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, whole = step(with_loss(model, "chunked")), step(with_loss(model, "whole"))
    for name, right in expected.items():
        error, usual = ((t[name] - right).norm() / right.norm() for t in (narrow, whole))
        assert error <= usual + torch.finfo(torch.bfloat16).eps, name


@pytest.mark.parametrize("head", [None, "lora", "dora"])
def test_log_probabilities_of_tokens_are_those_of_logits(head: str | None) -> None:
    """Log-probabilities and their gradients agree in train and eval mode, also if a head is computed as a whole."""
    own = [{"method": head, "name": "head", "target": {"modules": "lm_head"}}] if head else []
    compiled = with_loss(in_float64(tiny("llama")), "whole", adapt=[LORA, *own])
    shifted = functional.pad(LABELS, (0, 1), value=-100)[:, 1:]
    for mode in (True, False):
        logits = compiled.train(mode)(**CALL).logits
        taken = logits.log_softmax(-1).gather(-1, shifted.clamp_min(0)[..., None])[..., 0]
        expected = torch.where(shifted == -100, 0, taken)
        log_probs = compiled.token_log_probs(**CALL)
        weights = torch.rand(expected.shape, dtype=torch.float64)
        parameters = [p for p in compiled.parameters() if p.requires_grad]
        torch.testing.assert_close(log_probs, expected, rtol=1e-10, atol=1e-12)
        grads = (torch.autograd.grad((t * weights).sum(), parameters) for t in (log_probs, expected))
        for mine, right in zip(*grads, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-9, atol=1e-11)
    with compiled.disabled():
        base = compiled.token_log_probs(**CALL)
    assert not torch.equal(base, expected) and base.shape == expected.shape


def trained(folder: Path, loss: str, **changes: Any) -> tuple[list[float], tuple[int, ...]]:
    """Return the losses of a run of transformers' Trainer, and the shape of the predictions given to its metrics."""
    from transformers import Trainer, TrainingArguments

    seen: list[tuple[int, ...]] = []

    def metrics(predicted: Any) -> dict[str, float]:
        seen.append(predicted.predictions.shape)
        return {}

    rows = torch.randint(3, 100, (24, 8), generator=torch.Generator().manual_seed(0))
    data = [
        {"input_ids": row, "labels": row.masked_fill(torch.arange(8) < at % 6, -100)} for at, row in enumerate(rows)
    ]
    settings: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    settings |= {"report_to": [], "save_strategy": "no", "logging_steps": 1, "use_cpu": True, "disable_tqdm": True}
    settings |= {"eval_strategy": "steps", "eval_steps": 3, "learning_rate": 5e-3}
    args = TrainingArguments(str(folder), **settings, **changes)
    model = graftc.compile({"adapt": [LORA], "memory": {"loss": loss}}, tiny("llama"), seed=0)
    trainer = Trainer(model, args, train_dataset=data, eval_dataset=data[:8], compute_metrics=metrics)  # type: ignore[arg-type]
    trainer.train()
    logged = trainer.state.log_history
    return [entry[key] for entry in logged for key in ("loss", "eval_loss") if key in entry], seen[0]


@pytest.mark.parametrize("changes", [{}, {"label_smoothing_factor": 0.1}, {"gradient_checkpointing": True}], ids=str)
def test_the_trainer_logs_the_same_losses(changes: dict[str, Any], tmp_path: Path) -> None:
    """The count of items is that of the whole step, and metrics receive logits."""
    (chunked, shape), (expected, _) = (trained(tmp_path, loss, **changes) for loss in ("chunked", "whole"))
    torch.testing.assert_close(chunked, expected, rtol=1e-5, atol=0)
    assert shape == (8, 8, VOCABULARY) and len(chunked) == 4
