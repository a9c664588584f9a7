"""`memory: {loss: chunked}` on every family and with adapted heads: losses and gradients of whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from graftc.passes.core.ops import head_loss
from graftc.runtime.compiled import Compiled
from graftc.testing import tiny
from graftc.testing.families import _COMMON, VOCABULARY
from graftc.testing.perturb import randomise
from tests.runtime.test_chunked_loss import CALL, IDS, LABELS, LORA, assert_equal, made, step

pytestmark = pytest.mark.gate


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_loss, "CHUNK_ROWS", {"cpu": 3})
    monkeypatch.setattr(head_loss, "CHUNK_BYTES", {"cpu": 1})


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
    """A model whose loss is in float64: transformers' own casts logits to float32."""

    def loss(
        logits: Tensor, labels: Tensor | None, vocab_size: int, shift_labels: Any = None, **options: Any
    ) -> Tensor:
        if shift_labels is None:
            assert labels is not None
            shift_labels = functional.pad(labels, (0, 1), value=-100)[..., 1:]
        count = options.get("num_items_in_batch")
        flat = logits.view(-1, vocab_size), shift_labels.reshape(-1)
        found = functional.cross_entropy(*flat, reduction="mean" if count is None else "sum")
        return found if count is None else found / count

    if hasattr(model, "loss_function"):
        model.loss_function = loss  # type: ignore[assignment]
    return model.double()


def assert_chunked(compiled: Compiled) -> None:
    with torch.no_grad():
        assert "logits" not in compiled(**CALL)


@pytest.mark.parametrize("family", MODELS)
def test_losses_and_gradients_are_those_of_whole_logits(family: str) -> None:
    model = MODELS[family]()
    chunked = made(model, "chunked")
    assert_chunked(chunked)
    assert_equal(step(chunked), step(made(model, "whole")), 1e-5)
    model = in_float64(model)
    assert_equal(step(made(model, "chunked")), step(made(model, "whole")), 1e-10)


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
    chunked = made(model, "chunked", call, **spec)
    assert_chunked(chunked)
    assert_equal(step(chunked, call), step(made(model, "whole", call, **spec), call), 1e-10)


def test_counts_and_labels_that_are_shifted_already() -> None:
    model = in_float64(tiny("llama"))
    call = {**CALL, "num_items_in_batch": torch.tensor(13), "shift_labels": LABELS.roll(-1, 1)}
    assert_equal(step(made(model, "chunked", call), call), step(made(model, "whole", call), call), 1e-10)


def test_torch_compile_takes_the_whole_graph() -> None:
    compiled = made(tiny("llama"), "chunked")
    expected = step(compiled)
    assert_equal(step(torch.compile(compiled, fullgraph=True, backend="aot_eager")), _renamed(expected), 1e-5)  # type: ignore[arg-type]


def _renamed(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name if name == "loss" else f"_orig_mod.{name}": tensor for name, tensor in found.items()}


def test_checkpointing_and_autocast_work_with_it() -> None:
    model = tiny("llama")
    expected = step(made(model, "whole"))
    assert_equal(step(made(model, "chunked", checkpoint="layers")), expected, 1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, whole = step(made(model, "chunked")), step(made(model, "whole"))
    for name, right in expected.items():
        error, usual = ((t[name] - right).norm() / right.norm() for t in (narrow, whole))
        assert error <= usual + torch.finfo(torch.bfloat16).eps, name
