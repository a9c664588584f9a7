"""AdaLoRA compared with the installed peft: outputs, the objective, importance and the budget, step by step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.passes.methods.adalora import RankBudget
from graftc.testing import largest_difference, perturb
from graftc.testing.compare import SHAPES, inputs_for, outputs_of
from graftc.testing.families import tiny
from tests.kit.comparing import floats, trainable
from tests.parity.support import MODULES

peft = pytest.importorskip("peft")
RANK, TARGET, ALPHA, WEIGHT, TOTAL, FINAL = 5, 2, 7, 0.4, 9, 2


@dataclass(frozen=True)
class Schedule:
    """The numbers of steps, and the seed for perturbing the tensors."""

    total: int = TOTAL
    final: int = FINAL
    interval: int = 2
    seed: int = 0


USUAL = Schedule()


def ours(family: str, schedule: Schedule = USUAL) -> Any:
    """A model adapted by graftc, with perturbed tensors."""
    entry = {
        "method": "adalora",
        "target": {"modules": [f"**.{name}" for name in MODULES[family]]},
        "rank": RANK,
        "target_rank": TARGET,
        "alpha": ALPHA,
        "orthogonality": WEIGHT,
        "warmup_steps": 1,
        "final_steps": schedule.final,
        "interval": schedule.interval,
        "total_steps": schedule.total,
        "beta1": 0.8,
        "beta2": 0.7,
    }
    compiled = graftc.compile({"adapt": [entry]}, tiny(family)).eval()
    perturb(compiled, 0.2, seed=schedule.seed)
    return compiled


def theirs(family: str, compiled: Any, schedule: Schedule = USUAL) -> tuple[Any, dict[str, Tensor]]:
    """Return the model adapted by peft with the same tensors, and peft's parameter for each of ours."""
    config = peft.AdaLoraConfig(
        init_r=RANK,
        target_r=TARGET,
        lora_alpha=ALPHA,
        target_modules=MODULES[family],
        orth_reg_weight=WEIGHT,
        tinit=1,
        tfinal=schedule.final,
        deltaT=schedule.interval,
        total_step=schedule.total,
        beta1=0.8,
        beta2=0.7,
        fan_in_fan_out=family == "gpt2",
    )
    other = peft.get_peft_model(tiny(family), config).eval()
    parameters = dict(other.named_parameters())
    pairs: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, tensor in compiled.named_parameters():
            if tensor.requires_grad:
                module, _, part = name.partition(".graftc.adalora.")
                pairs[name] = parameters[f"base_model.model.{module}.lora_{part}.default"]
                pairs[name].copy_(tensor.reshape(pairs[name].shape))
    assert len(pairs) == sum(parameter.requires_grad for parameter in other.parameters())
    return other, pairs


def allocator_of(other: Any) -> Any:
    """Peft's rank allocator."""
    return other.base_model.rankallocator


@pytest.mark.full
@pytest.mark.parametrize("family", MODULES)
def test_outputs_and_objective(family: str) -> None:
    """Logits agree at three shapes, merged as well, and the objective is the term that peft adds to a loss."""
    compiled = ours(family)
    other, _ = theirs(family, compiled)
    calls = [inputs_for(compiled, sizes) for sizes in SHAPES]
    for inputs in calls:
        assert largest_difference(outputs_of(compiled, inputs), outputs_of(other, inputs)) <= 1e-5
    inputs = calls[0]
    labels = torch.arange(5) % 3 if family in ("bert", "vit") else inputs.get("decoder_input_ids", inputs["input_ids"])
    with torch.no_grad():
        # Without a task type, the model around `base_model` bypasses the forward that adds the term.
        added = other.base_model(**inputs, labels=labels).loss - compiled(**inputs, labels=labels).loss
    assert abs(float(added) - compiled.extra_loss().item()) <= 1e-5
    merged = compiled.merge()
    whole = other.merge_and_unload()
    for inputs in calls:
        assert largest_difference(outputs_of(merged, inputs), outputs_of(whole, inputs)) <= 1e-5


@pytest.mark.slow
@pytest.mark.sample("t5")
@pytest.mark.parametrize("family", MODULES)
def test_importance_budget_and_masks(family: str) -> None:
    """In a full training with plain SGD, averages, budgets, masks and tensors agree after every step."""
    train_both(family, USUAL)


@pytest.mark.full
@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(total, final, interval, seed)
        for total, final, interval in ((20, 4, 4), (16, 2, 6))
        for seed in range(2)
    ],
    ids=str,
)
def test_the_last_choice_is_made_by_the_last_importance(schedule: Schedule) -> None:
    """Even if rounding lets the budget reach its target earlier, the last step chooses again, as in peft."""
    train_both("bert", schedule, weight=1.0)


def train_both(family: str, schedule: Schedule, weight: float = 1e-3) -> None:
    """Train our model and peft's side by side, and compare them after every step.

    Args:
        family: the family of the model.
        schedule: the schedule of the budget, and the seed.
        weight: the weight of the outputs' part of the loss, which differs from step to step.
    """
    compiled = ours(family, schedule)
    other, pairs = theirs(family, compiled, schedule)
    mine = trainable(compiled)
    optimisers = [torch.optim.SGD(list(ps.values()), lr=1e-3) for ps in (mine, pairs)]
    budget = compiled.steering.controllers["adalora"]
    assert isinstance(budget, RankBudget)
    left = []
    for number in range(1, schedule.total + 1):
        inputs = inputs_for(compiled, seed=number)
        for model, extra in ((compiled, compiled.extra_loss()), (other, peft_objective(other))):
            leaves = floats(model(**inputs))
            generator = torch.Generator().manual_seed(number)
            loss = sum((leaf * torch.randn(leaf.shape, generator=generator)).sum() for leaf in leaves)
            (weight * loss + extra).backward()
        for optimiser in optimisers:
            optimiser.step()
        compiled.after_step()
        other.base_model.update_and_allocate(number)
        for optimiser in optimisers:
            optimiser.zero_grad()
        assert budget.budget(number) == allocator_of(other).budget_schedule(number)[0]
        for name, tensor in mine.items():
            value = tensor.detach()
            torch.testing.assert_close(value, pairs[name].reshape(value.shape), rtol=1e-5, atol=1e-5, msg=name)
            assert torch.equal(value == 0, pairs[name].reshape(value.shape) == 0), f"{name} after step {number}"
        if number < schedule.total - schedule.final:
            compare_importance(compiled, pairs, other)
        left.append(sum(int((t != 0).sum()) for name, t in mine.items() if name.endswith(".E")))
    assert left[-1] == budget.target < left[0]


def peft_objective(other: Any) -> Tensor:
    """Return the term that peft adds in a forward pass with labels, which not every call here has."""
    total, count = torch.zeros(()), 0
    for name, parameter in other.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            gram = parameter @ parameter.T if "lora_A" in name else parameter.T @ parameter
            total, count = total + torch.norm(gram - torch.eye(len(gram)), p="fro"), count + 1
    return WEIGHT * total / count


def compare_importance(compiled: Any, pairs: dict[str, Tensor], other: Any) -> None:
    """Check both moving averages of every parameter, to 1e-5."""
    names = {id(parameter): name for name, parameter in other.base_model.model.named_parameters()}
    allocator, state = allocator_of(other), compiled.adapter_state_dict()
    for name, parameter in pairs.items():
        for kind, averages in (("sensitivity", allocator.exp_avg_ipt), ("uncertainty", allocator.exp_avg_unc)):
            average = state[f"{name}_{kind}"]
            expected = averages[names[id(parameter)]].reshape(average.shape)
            assert float((average - expected).abs().max()) <= 1e-5, f"{name}_{kind}"
