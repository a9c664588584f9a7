"""Objectives that compare several passes of one call: their value, where it is added, and that it counts once."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

import graftc
from graftc.runtime.training.repeated import outputs_of
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing import perturb
from graftc.testing.compare import flat, inputs_for
from tests.kit.comparing import gradients_of
from tests.kit.models import adapted, still
from tests.kit.refusals import no_warning

ENTRY: dict[str, Any] = {"method": "adamix", "bottleneck": 5, "share": "none"}
SETTINGS = {"alike": {"weight": 0.7}, "attached": {"weight": 0.7, "detach": False}, "none": {"weight": 0}}


def doubled(consistency: dict[str, Any], family: str = "bert", model: Any = None, **fields: Any) -> Any:
    """A tiny model with experts in train mode, with no dropout in its base."""
    entry = {**ENTRY, "consistency": consistency, **fields}
    return adapted(model or still(family), entry, noise=0.2).train()


def like(compiled: Any, consistency: dict[str, Any], family: str = "bert", **fields: Any) -> Any:
    """Return the same model with another term."""
    other = doubled(consistency, family, **fields)
    other.load_adapter_state_dict(compiled.adapter_state_dict())
    return other


def two_passes(plain: Any, seed: int, **inputs: Any) -> list[Any]:
    """Call a model without the term twice, with the draws of one call with it."""
    torch.manual_seed(seed)
    return [plain(**inputs), plain(**inputs)]


def divergence(first: Tensor, second: Tensor, detach: bool) -> Tensor:
    """Compute `1/2 (KL(p1 || p2) + KL(p2 || p1))` by hand, per row."""

    def kl(p: Tensor, q: Tensor) -> Tensor:
        p = p.detach() if detach else p
        return (p.softmax(-1) * (p.softmax(-1).log() - q.softmax(-1).log())).sum(-1)

    return (kl(first, second) + kl(second, first)) / 2


def gradients(loss: Tensor, model: Any) -> dict[str, Tensor]:
    """Return the gradients of the trained tensors by name."""
    model.zero_grad()
    loss.backward()
    return gradients_of(model)


LABELS = torch.arange(5) % 3


@pytest.mark.full
@pytest.mark.parametrize("kind", ["alike", "attached"])
def test_value_and_gradient_are_those_of_the_formula(kind: str) -> None:
    """The loss is that of the first pass plus the term, with the gradient of both, whether detached or not."""
    compiled = doubled(SETTINGS[kind])
    plain = like(compiled, SETTINGS["none"])
    inputs = inputs_for(compiled)
    first, second = two_passes(plain, 3, **inputs, labels=LABELS)
    term = 0.7 * divergence(first.logits, second.logits, kind == "alike").mean()
    assert float(term.detach()) > 1e-3
    torch.manual_seed(3)
    outputs = compiled(**inputs, labels=LABELS)
    torch.testing.assert_close(outputs.loss, first.loss + term)
    assert torch.equal(outputs.logits, first.logits)
    expected = gradients(first.loss + term, plain)
    grads = gradients(outputs.loss, compiled)
    assert grads.keys() == expected.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.full
def test_detaching_changes_the_gradient_only() -> None:
    compiled = doubled(SETTINGS["alike"])
    other = like(compiled, SETTINGS["attached"])
    inputs = inputs_for(compiled)
    losses, grads = [], []
    for model in (compiled, other):
        torch.manual_seed(1)
        loss = model(**inputs, labels=LABELS).loss
        losses.append(float(loss.detach()))
        grads.append(gradients(loss, model))
    assert losses[0] == losses[1]
    assert any((grads[0][name] - grads[1][name]).abs().max() > 1e-5 for name in grads[0])


@pytest.mark.full
def test_positions_of_a_causal_model() -> None:
    """Positions that predict a label other than -100 count: exactly those where the loss has a gradient."""
    compiled = doubled(SETTINGS["alike"], "gpt2")
    plain = like(compiled, SETTINGS["none"], "gpt2")
    inputs = inputs_for(compiled)
    labels = inputs["input_ids"].clone()
    labels[0] = labels[1, :4] = labels[2, 5:] = -100
    first, second = two_passes(plain, 3, **inputs, labels=labels)
    (gradient,) = torch.autograd.grad(first.loss, first.logits, retain_graph=True)
    counted = gradient.abs().amax(-1) > 0
    assert counted.any() and not counted.all() and not counted[0].any() and not counted[:, -1].any()
    rows = divergence(first.logits, second.logits, True)
    torch.manual_seed(3)
    loss = compiled(**inputs, labels=labels).loss
    torch.testing.assert_close(loss, first.loss + 0.7 * rows[counted].mean())
    labels.fill_(-100)
    torch.manual_seed(3)
    assert compiled(**inputs, labels=labels).loss.isnan()  # as the model's own loss, a mean over no labels


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "llama", "gpt_neox", "mixtral", "t5"])
def test_where_labels_stand(family: str) -> None:
    """Causal models predict the next label, an encoder and decoder the label at the same position."""
    compiled = doubled(SETTINGS["alike"], family)
    inputs = inputs_for(compiled)
    labels = inputs["decoder_input_ids" if family == "t5" else "input_ids"]
    compiled(**inputs, labels=labels)
    executables = compiled.shown.executables.items()
    (shift,) = {outputs_of(each).shift for key, each in executables if "labels" in str(key)}
    assert shift == (family != "t5")


@pytest.mark.full
def test_one_logit_has_nothing_to_differ_in() -> None:
    """In regression, the term is zero and the loss is that of the first pass."""
    model = still("bert", num_labels=1)
    compiled = doubled(SETTINGS["alike"], model=model)
    inputs = inputs_for(compiled)
    torch.manual_seed(3)
    plain = like(compiled, SETTINGS["none"], model=model)(**inputs, labels=torch.randn(5)).loss
    torch.manual_seed(3)
    assert torch.equal(compiled(**inputs, labels=torch.randn(5)).loss, plain)


@pytest.mark.slow
def test_a_single_expert_agrees_with_itself() -> None:
    """The term is zero without dropout, and not with it."""
    inputs = None
    for dropout, zero in ((0.0, True), (0.3, False)):
        compiled = doubled(SETTINGS["alike"], experts=1, dropout=dropout)
        inputs = inputs_for(compiled)
        compiled(**inputs)
        assert (float(compiled.extra_loss().detach()) == 0) is zero


@pytest.mark.full
def test_without_a_weight_there_is_one_pass() -> None:
    """Nothing is drawn twice, and eval mode and the base alone always have one pass."""
    inputs = inputs_for(doubled(SETTINGS["none"]))
    for setting, mode, expected in (("none", "train", 1), ("alike", "train", 2), ("alike", "eval", 1)):
        compiled = doubled(SETTINGS[setting])
        compiled.train(mode == "train")
        calls = counted_runs(compiled)
        compiled(**inputs)
        assert len(calls) == expected
        with compiled.disabled():
            compiled(**inputs)
        assert len(calls) == expected + 1
        compiled.extra_loss()


def counted_runs(compiled: Any) -> list[str]:
    """Return a list that grows with each run of a Program."""
    calls: list[str] = []
    original = compiled._graftc.run

    def run(key: str, inputs: Any) -> Any:
        calls.append(key)
        return original(key, inputs)

    compiled._graftc.run = run
    return calls


@pytest.mark.full
def test_a_loss_of_ones_own() -> None:
    """Without labels, the term waits for `extra_loss`, which returns it once, as the mean over the calls."""
    compiled = doubled(SETTINGS["alike"])
    plain = like(compiled, SETTINGS["none"])
    calls = [inputs_for(compiled, seed=seed) for seed in range(3)]
    terms = []
    for seed, inputs in enumerate(calls):
        first, second = two_passes(plain, seed, **inputs)
        terms.append(0.7 * divergence(first.logits, second.logits, True).mean())
    with no_warning():
        loss = torch.zeros(())
        for seed, inputs in enumerate(calls):
            torch.manual_seed(seed)
            loss = loss + functional.cross_entropy(compiled(**inputs).logits, LABELS)
        extra = compiled.extra_loss()
        torch.testing.assert_close(extra, torch.stack(terms).mean())
        (loss + extra).backward()
        assert compiled.extra_loss().item() == 0
        compiled(**calls[0], labels=LABELS).loss.backward()
        assert compiled.extra_loss().item() == 0, "a term in the loss is not in here as well"
        compiled.after_step()


@pytest.mark.slow
def test_a_term_that_is_missed() -> None:
    """The backward pass that lacks the term warns with GC025, once, and nothing is kept."""
    compiled = doubled(SETTINGS["alike"])
    inputs = inputs_for(compiled)
    with pytest.warns(GraftWarning, match="GC025.*'adamix' has an objective") as caught:
        for _ in range(3):
            functional.cross_entropy(compiled(**inputs).logits, LABELS).backward()
    assert len([w for w in caught if isinstance(w.message, GraftWarning)]) == 1
    assert "labels" in (caught[0].message.hint or "")
    assert not compiled.progress.waiting and compiled.extra_loss().item() == 0
    compiled(**inputs)
    with torch.no_grad():
        compiled(**inputs)
    assert len(compiled.progress.waiting) == 1
    assert not copy.deepcopy(compiled).progress.waiting


@pytest.mark.full
@pytest.mark.parametrize("labelled", [True, False])
def test_accumulation_counts_each_micro_batch_once(labelled: bool) -> None:
    """Two halves, each with half of its loss, have the gradient of the formula."""
    compiled = doubled(SETTINGS["alike"])
    plain = like(compiled, SETTINGS["none"])
    whole = inputs_for(compiled, (4, 9))
    halves = [{n: t[i : i + 2] for n, t in whole.items()} | {"labels": LABELS[i : i + 2]} for i in (0, 2)]
    expected: Any = 0.0
    for seed, half in enumerate(halves):
        first, second = two_passes(plain, seed, **half)
        expected = expected + (first.loss + 0.7 * divergence(first.logits, second.logits, True).mean()) / 2
    compiled.zero_grad()
    for seed, half in enumerate(halves):
        torch.manual_seed(seed)
        if labelled:
            loss = compiled(**half).loss
        else:
            labels = half.pop("labels")
            loss = functional.cross_entropy(compiled(**half).logits, labels) + compiled.extra_loss()
        (loss / 2).backward()
    grads = gradients_of(compiled)
    for name, gradient in gradients(expected, plain).items():
        torch.testing.assert_close(grads[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_two_adaptations_have_a_term_each() -> None:
    """The terms are of the same two passes, each with its weight, and are added to a term of tensors."""
    sora = {"method": "sora", "target": {"role": "attn.q"}, "l1": 0.1}
    low_rank = {"method": "adamix_lora", "target": {"role": "attn.v"}, "consistency": {"weight": 0.5}, "dropout": 0}
    entries = [{**ENTRY, "consistency": {"weight": 0.25}}, low_rank, sora]
    compiled = adapted(still("bert"), *entries, noise=0.2).train()
    inputs = inputs_for(compiled)
    alone = float(compiled.extra_loss().detach())
    torch.manual_seed(0)
    passes = [compiled.run(compiled.ready(inputs), inputs)[0] for _ in range(2)]
    torch.manual_seed(0)
    compiled(**inputs)
    extra = compiled.extra_loss()
    torch.testing.assert_close(extra.detach(), 0.75 * divergence(*passes, True).mean() + alone)


@pytest.mark.full
@pytest.mark.parametrize("labelled", [True, False])
def test_a_compiled_training_step(labelled: bool) -> None:
    """`torch.compile(fullgraph=True)` handles both passes and the term, also without labels, where the term waits."""
    import torch._dynamo as dynamo

    compiled = doubled(SETTINGS["alike"], experts=1)  # nothing is drawn, so that both give the same
    other = doubled(SETTINGS["alike"])
    other_inputs = inputs_for(other) | ({"labels": LABELS} if labelled else {})
    inputs = inputs_for(compiled) | ({"labels": LABELS} if labelled else {})
    for model, own in ((compiled, inputs), (other, other_inputs)):
        model(**own)
        model.extra_loss()
        dynamo.reset()
        whole = torch.compile(model, fullgraph=True, backend="aot_eager")
        seen = set()
        for _ in range(8):
            model.zero_grad()
            outputs = whole(**own)
            loss = outputs.loss if labelled else outputs.logits.square().sum()
            (loss + model.extra_loss()).backward()
            seen.add(float(loss.detach()))
            assert not model.progress.waiting
        assert (len(seen) == 1) is (model is compiled)
        assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    dynamo.reset()


def test_other_outputs() -> None:
    """A model without logits is compared by its first output, and its inputs are not needed."""

    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = torch.nn.Linear(6, 8), torch.nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.relu(self.first(x)))

    entry = {"method": "adamix_lora", "target": {"modules": "first"}, "rank": 2, "dropout": 0}
    compiled = graftc.compile({"adapt": [entry]}, Plain(), [torch.randn(3, 6)]).train()
    perturb(compiled, 0.5)
    x = torch.randn(5, 6)
    torch.manual_seed(0)
    passes = [compiled.run(compiled.ready({"x": x}), {"x": x})[0] for _ in range(2)]
    torch.manual_seed(0)
    assert torch.equal(flat(compiled(x))[0], passes[0])
    torch.testing.assert_close(compiled.extra_loss(), divergence(*passes, True).mean())
