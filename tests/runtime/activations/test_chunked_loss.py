"""`memory: {loss: chunked}`: the same losses and gradients, and no logits in training outputs."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.testing import tiny
from graftc.testing.families import VOCABULARY
from tests.kit.comparing import gradients_of
from tests.kit.models import fresh
from tests.kit.settings import small_chunks

LORA: dict[str, Any] = {"method": "lora", "rank": 2, "target": {"role": "attn.q"}}
IDS = torch.randint(0, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(0))
LABELS = IDS.masked_fill(torch.arange(7) < 3, -100)
CALL = {"input_ids": IDS, "labels": LABELS}


def with_loss(model: nn.Module, loss: str, call: dict[str, Any] = CALL, **spec: Any) -> Compiled:
    """Return a compiled model in train mode, with adapters away from their initial values."""
    torch.manual_seed(0)
    compiled = fresh(copy.deepcopy(model), LORA, inputs=call, **spec, memory={"loss": loss}).train()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for _, tensor in sorted(compiled.named_parameters()):
            if tensor.requires_grad:
                tensor += 0.1 * torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
    return compiled


def step(compiled: nn.Module, call: dict[str, Any] = CALL) -> dict[str, Tensor]:
    """Return the loss and all gradients of a step, with the same dropouts each time."""
    torch.manual_seed(2)
    compiled.zero_grad()
    loss = compiled(**call).loss
    (3 * loss).backward()
    grads = gradients_of(compiled)
    return {"loss": loss.detach(), **grads}


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert actual.keys() == expected.keys() and len(actual) > 1
    for name, right in expected.items():
        error, size = (actual[name] - right).abs().max(), right.abs().max()
        assert error <= tolerance * size, f"{name}: {error} of {size}"


@pytest.fixture(autouse=True)
def chunks_of_three_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    small_chunks(monkeypatch)


@pytest.mark.full
def test_losses_and_gradients_are_those_of_whole_logits() -> None:
    """All families, float64 and adapted heads are tested in tests/gates/test_chunked_loss.py."""
    model = tiny("llama")
    assert_equal(step(with_loss(model, "chunked")), step(with_loss(model, "whole")), 1e-5)


@pytest.mark.full
@pytest.mark.parametrize("method", ["dora", "ia3"])
def test_other_heads_stay_whole_and_say_why(method: str) -> None:
    spec = {"adapt": [LORA, {"name": "head", "method": method, "target": {"modules": "lm_head"}}]}
    with pytest.warns(GraftWarning, match=r"GC151.*lm_head: 'head' adapts the head with"):
        compiled = with_loss(tiny("llama"), "chunked", **spec)
    assert compiled(**CALL).logits.shape == (2, 7, VOCABULARY)
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        with_loss(tiny("llama"), "auto", **spec)


@pytest.mark.full
def test_a_head_over_few_classes_stays_whole() -> None:
    call = {"input_ids": IDS, "labels": LABELS[:, -1] % 3}
    with pytest.warns(GraftWarning, match=r"GC151.*3 logits are no more than the 48 values"):
        compiled = with_loss(tiny("bert"), "chunked", call)
    assert compiled(**call).logits.shape == (2, 3)


@pytest.mark.full
def test_a_batch_without_labels_has_torchs_loss() -> None:
    call = {"input_ids": IDS, "labels": torch.full_like(IDS, -100)}
    compiled = with_loss(tiny("llama"), "chunked")
    loss = compiled(**call).loss
    loss.backward()
    assert loss.isnan()
    assert all(t.grad is None or not t.grad.any() for t in compiled.parameters())


class TestOutputs:
    @pytest.fixture
    def compiled(self) -> Compiled:
        return with_loss(tiny("llama"), "chunked")

    @pytest.mark.slow
    def test_logits_are_refused(self, compiled: Compiled) -> None:
        outputs = compiled(**CALL)
        for ask in (lambda: outputs.logits, lambda: outputs["logits"]):
            with pytest.raises(GraftError, match="GC150"):
                ask()
        assert not hasattr(outputs, "logits") and "logits" not in outputs

    @pytest.mark.full
    def test_the_rest_is_as_it_was(self, compiled: Compiled) -> None:
        outputs = compiled(**CALL, output_hidden_states=True)
        assert isinstance(outputs, type(compiled.eval()(**CALL)))
        compiled.train()
        assert outputs[0] is outputs.loss is outputs["loss"]
        assert list(outputs) == ["loss", "hidden_states"] and len(outputs.to_tuple()) == 2
        assert outputs.past_key_values is None
        (loss,) = compiled(**CALL, return_dict=False)
        assert torch.equal(loss, outputs.loss)

    @pytest.mark.slow
    def test_a_model_with_views_is_copied(self, compiled: Compiled) -> None:
        with compiled.disabled("lora"):
            assert "logits" not in compiled(**CALL)
        assert_equal(step(copy.deepcopy(compiled)), step(compiled), 1e-6)

    @pytest.mark.slow
    def test_copies_are_of_the_plain_class(self, compiled: Compiled) -> None:
        with torch.no_grad():
            copied = copy.deepcopy(compiled(**CALL))
        assert copied.logits is None and copied.loss is not None

    @pytest.mark.full
    def test_logits_are_there_in_eval_mode_without_labels_and_without_adaptations(self, compiled: Compiled) -> None:
        assert compiled(input_ids=IDS).logits.shape == (2, 7, VOCABULARY)
        with compiled.disabled():
            assert "logits" in compiled(**CALL)
        assert "logits" in compiled.eval()(**CALL)
        compiled.train()


@pytest.mark.full
def test_the_portable_program_and_artifacts_keep_the_logits(tmp_path: Path) -> None:
    compiled = with_loss(tiny("llama"), "chunked")
    assert "logits" in compiled.compilation.program("train").outputs.names
    expected = step(compiled)
    compiled.save(tmp_path / "artifact")
    loaded = graftc.load(tmp_path / "artifact", tiny("llama")).train()
    assert loaded.spec.memory.loss == "chunked"
    assert_equal(step(loaded), expected, 1e-6)


@pytest.mark.full
@pytest.mark.parametrize(("vocabulary", "chunked"), [(VOCABULARY, False), (20 * VOCABULARY, True)])
def test_auto_decides_by_size(vocabulary: int, chunked: bool) -> None:
    compiled = with_loss(tiny("llama", vocab_size=vocabulary, intermediate_size=400), "auto")
    assert ("logits" not in compiled(**CALL)) is chunked


@pytest.mark.slow
def test_auto_counts_what_checkpoints_keep() -> None:
    """Layers that keep only their inputs leave a larger share of the memory to the logits."""
    for checkpoint, chunked in ((None, False), ("layers", True)):
        compiled = with_loss(tiny("llama", layers=12), "auto", checkpoint=checkpoint)
        assert ("logits" not in compiled(**CALL)) is chunked


@pytest.mark.slow
def test_objectives_that_compare_outputs_keep_them() -> None:
    spec = {"adapt": [{"method": "adamix_lora", "target": {"role": "attn.q"}}]}
    with pytest.warns(GraftWarning, match="GC151.*compares the outputs of several passes"):
        compiled = with_loss(tiny("gpt2"), "chunked", **spec)
    assert "logits" in compiled(**CALL)


@pytest.mark.slow
def test_log_probabilities_of_tokens_need_labels_and_sum_up_to_the_loss() -> None:
    compiled = with_loss(tiny("llama"), "whole")
    log_probs = compiled.token_log_probs(**CALL)
    assert log_probs.shape == IDS.shape
    torch.testing.assert_close(-log_probs.sum() / (LABELS[:, 1:] != -100).sum(), compiled(**CALL).loss)
    with pytest.raises(GraftError, match="GC073"):
        compiled.token_log_probs(input_ids=IDS)
