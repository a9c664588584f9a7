"""`graftc.optim.watch`: tensors that train in name only are reported in the first steps, and no others."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.specs.errors.diagnostics import GraftError, GraftWarning
from graftc.specs.registry import method_specs
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import tiny
from tests.kit.comparing import trainable
from tests.kit.models import fresh
from tests.kit.refusals import no_warning
from tests.kit.training import adamw

LORA = {"name": "low", "method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 2}


def loss_of(compiled: Any) -> Tensor:
    """Compute a loss of all outputs of one batch."""
    return sum(leaf.float().square().mean() for leaf in flat(compiled(**inputs_for(compiled))) if leaf.requires_grad)


def train(compiled: Any, optimizer: Any, steps: int = 3, loss: Callable[[Any], Tensor] = loss_of) -> None:
    """Do steps of a plain loop."""
    for _ in range(steps):
        (loss(compiled) + compiled.extra_loss()).backward()
        optimizer.step()
        compiled.after_step()
        optimizer.zero_grad()


def example(method: str) -> Any:
    """Compile an adaptation with only the required fields of the method, on a family that it fits."""
    entry = {"method": method, **method_specs()[method].needed}
    if method == "pasta":
        entry["special_tokens"] = [1, 2]
    if method == "alora":
        entry["invocation"] = [64, 61]  # the first tokens of every batch
    if "target" not in entry and method_specs()[method].spec_class.model_fields["target"].is_required():
        entry["target"] = {"role": ["attn.q", "attn.v", "ffn.down"]}
    family = {"cross_attention": "t5", "pasta": "bert"}.get(method, "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", GraftWarning)
        return graftc.compile({"adapt": [entry]}, tiny(family)).train()


@pytest.mark.full
@pytest.mark.parametrize("method", method_specs())
def test_no_method_alarms(method: str) -> None:
    """Every trained tensor is watched, and none is reported at any step."""
    compiled = example(method)
    compiled.begin(100)
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))
    check = graftc.optim.watch(compiled, optimizer)
    assert check.watched == sum(p.requires_grad for p in compiled.parameters()) > 0
    with no_warning():
        train(compiled, optimizer)
    assert check.done and not check.findings


@pytest.mark.slow
def test_a_tensor_is_in_no_optimiser() -> None:
    compiled = fresh("gpt2", LORA, train=["transformer.ln_f"]).train()
    optimizer = torch.optim.SGD([p for n, p in compiled.named_parameters() if p.requires_grad and "ln_f" not in n])
    check = graftc.optim.watch(compiled, optimizer)
    with pytest.warns(GraftWarning, match="GC059: 2 of 10 tensors") as caught:
        train(compiled, optimizer, 1)
    assert "param_groups" in str(caught[0].message) and not check.done
    assert all("ln_f" in name and "in no optimiser" in text for name, text in check.findings.items())
    with no_warning():  # each is named once
        train(compiled, optimizer)
    assert len(check.findings) == 2 and check.done
    other = torch.optim.SGD([p for n, p in compiled.named_parameters() if "ln_f.graftc" in n])
    check = graftc.optim.watch(compiled, optimizer, other)
    with no_warning():
        for _ in range(3):
            loss_of(compiled).backward()
            optimizer.step()
            other.step()
    assert check.done and not check.findings


@pytest.mark.slow
def test_the_loss_depends_on_nothing() -> None:
    """If inputs of recomputed layers require no gradient, training continues in this way, and nothing is learnt."""
    compiled = fresh(
        "gpt2", {**LORA, "target": {"role": "attn.q", "layers": 0}}, {**LORA, "name": "high", "method": "dora"}
    ).train()
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))

    def cut(compiled: Any) -> Tensor:
        own = [p for n, p in compiled.named_parameters() if ".high." in n]
        return sum((p * p).sum() for p in own)

    check = graftc.optim.watch(compiled, optimizer)
    with pytest.warns(GraftWarning, match=r"(?s)GC059.*the loss does not depend on it"):
        train(compiled, optimizer, 1, cut)
    assert sorted({name.split(".graftc.")[1].split(".")[0] for name in check.findings}) == ["low"]


@pytest.mark.slow
def test_zeros_are_told_after_the_last_step() -> None:
    """A gradient of zeros may be normal at the start, but not in every step."""
    compiled = fresh("gpt2", LORA).train()
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))
    check = graftc.optim.watch(compiled, optimizer)
    with no_warning():
        train(compiled, optimizer, 2, lambda c: 0 * loss_of(c))
    with pytest.warns(GraftWarning, match=r"(?s)GC059: 8 of 8.*only zero gradients"):
        train(compiled, optimizer, 1, lambda c: 0 * loss_of(c))
    assert check.done and len(check.findings) == 8


@pytest.mark.slow
def test_a_rate_of_zero() -> None:
    """A rate of zero is reported at once if nothing schedules it; a schedule may warm up, but not forever."""
    compiled = fresh("gpt2", LORA).train()
    still = torch.optim.AdamW(graftc.optim.param_groups(compiled, 0.0))
    graftc.optim.watch(compiled, still)
    with pytest.warns(GraftWarning, match=r"(?s)GC059.*learning rate of 0"):
        train(compiled, still, 1)
    for slope, alarms in ((1.0, False), (0.0, True)):
        optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step, slope=slope: slope * step / 10)
        check = graftc.optim.watch(compiled, optimizer)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", GraftWarning)
            for _ in range(3):
                train(compiled, optimizer, 1)
                schedule.step()
        assert check.done and bool(check.findings) == alarms


@pytest.mark.slow
def test_zeros_that_follow_from_a_rate_of_zero_are_no_finding_of_their_own() -> None:
    """LoRA's A has gradients of zeros as long as B does not move."""
    compiled = fresh("gpt2", LORA).train()
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 0.0))
    check = graftc.optim.watch(compiled, optimizer)
    with pytest.warns(GraftWarning, match="learning rate of 0") as caught:
        train(compiled, optimizer, 3)
    assert len(caught) == 1 and {name.rpartition(".")[2] for name in check.findings} == {"B"}


@pytest.mark.full
def test_steps_that_are_rounded_away() -> None:
    """In bfloat16 a step of 1e-5 moves few entries of A; in float32 it moves all of them."""
    for dtype in (torch.bfloat16, torch.float32):
        compiled = fresh("gpt2", LORA).train()
        factors = trainable(compiled)
        with torch.no_grad():
            for p in factors.values():
                p.data = p.data.uniform_(0.5, 1).to(dtype)
        optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-5))
        check = graftc.optim.watch(compiled, optimizer, steps=1)
        for p in factors.values():
            p.grad = torch.ones_like(p)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        assert len(check.findings) == (8 if dtype == torch.bfloat16 else 0)
        assert ("bfloat16 is too narrow" in str(caught[0].message)) if caught else dtype == torch.float32


@pytest.mark.slow
def test_what_is_frozen_later_and_what_is_held() -> None:
    """A tensor frozen by hand is reported, and so is one that is reset after each step."""
    compiled = fresh("gpt2", LORA).train()
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))
    frozen, reset = [(n, p) for n, p in compiled.named_parameters() if n.endswith(".B")][:2]
    optimizer.register_step_post_hook(lambda *_: reset[1].data.zero_())
    check = graftc.optim.watch(compiled, optimizer, steps=2)
    frozen[1].requires_grad_(False)
    with pytest.warns(GraftWarning, match="GC059"):
        train(compiled, optimizer, 2)
    findings = dict(check.findings)
    assert findings.pop(frozen[0]).startswith("has been frozen")
    assert findings.pop(reset[0]).startswith("did not move, although")
    # Without their B, these have no gradient either.
    assert all(name.endswith(".A") and "only zero gradients" in text for name, text in findings.items())


@pytest.mark.slow
def test_slots_that_no_call_chooses() -> None:
    """In a bank, only the chosen slot has a gradient, and the others are not reported."""
    two = [{**LORA, "name": name, "target": {"role": "attn.q"}} for name in ("one", "two")]
    compiled = fresh("gpt2", *two, compose={"bank": ["one", "two"], "name": "tasks"}).train()
    compiled.activate("two")
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))
    check = graftc.optim.watch(compiled, optimizer)
    with no_warning():
        train(compiled, optimizer)
    assert check.done and not check.findings


@pytest.mark.full
def test_in_the_trainer(tmp_path: Any) -> None:
    """`compiled.callback()` watches the training, with accelerate's wrapper around the optimiser."""
    from transformers import Trainer, TrainingArguments

    compiled = fresh("gpt2", LORA).train()
    data = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 8
    settings = TrainingArguments(str(tmp_path), max_steps=3, report_to=[], use_cpu=True, save_strategy="no")
    some = [p for n, p in compiled.named_parameters() if p.requires_grad and n.endswith(".B")]
    for parameters, alarms in ((some, True), ([p for p in compiled.parameters() if p.requires_grad], False)):
        optimizer = torch.optim.AdamW(parameters, lr=1e-3)
        trainer = Trainer(
            compiled, settings, train_dataset=data, optimizers=(optimizer, None), callbacks=[compiled.callback()]
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.train()
        told = [str(w.message) for w in caught if "GC059" in str(w.message)]
        assert len(told) == alarms and all("4 of 8" in text for text in told)
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.slow
def test_wrong_arguments() -> None:
    compiled = fresh("gpt2", LORA).train()
    optimizer = torch.optim.SGD(compiled.parameters(), lr=1e-3)
    for arguments, options in (((), {}), ((3,), {}), ((optimizer,), {"steps": 0})):
        with pytest.raises(GraftError, match="GC073"):
            graftc.optim.watch(compiled, *arguments, **options)


@pytest.mark.full
@pytest.mark.parametrize("by_name", [False, True])
def test_closures(by_name: bool) -> None:
    """Gradients exist once the closure was called: all that moves is seen, and nothing is reported."""
    compiled = fresh("gpt2", LORA).train()
    for make in (torch.optim.AdamW, torch.optim.LBFGS):
        optimizer = make([p for p in compiled.parameters() if p.requires_grad], lr=1e-3)
        check = graftc.optim.watch(compiled, optimizer)

        def closure(optimizer: Any = optimizer) -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(compiled)
            loss.backward()
            return loss

        with no_warning():
            for _ in range(3):
                loss = optimizer.step(closure=closure) if by_name else optimizer.step(closure)
                assert isinstance(loss, Tensor)
        assert check.done and not check.findings
    stuck = adamw(compiled, lr=0.0)
    check = graftc.optim.watch(compiled, stuck)
    with pytest.warns(GraftWarning, match="GC059"):
        stuck.step(lambda: closure(stuck))


@pytest.mark.full
def test_an_adaptation_that_is_removed_meanwhile() -> None:
    compiled = fresh("gpt2", LORA, {**LORA, "name": "other"}).train()
    optimizer = torch.optim.AdamW(graftc.optim.param_groups(compiled, 1e-3))
    check = graftc.optim.watch(compiled, optimizer)
    with no_warning():
        train(compiled, optimizer, 1)
        compiled.remove("other")
        train(compiled, optimizer, 2)
    assert check.done and not check.findings
