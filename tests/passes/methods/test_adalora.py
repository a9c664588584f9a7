"""AdaLoRA's budget, importance and objective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.methods.adalora import Orthogonality, RankBudget
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.specs import varied

ADALORA = {"method": "adalora", "target": {"role": ["attn.q", "ffn.down"]}, "rank": 6, "target_rank": 2}
QUERY = "bert.encoder.layer.0.attention.self.query"


def budget_of(compiled: Any) -> RankBudget:
    """The controller of the budget."""
    controller = compiled.steering.controllers["adalora"]
    assert isinstance(controller, RankBudget)
    return controller


def objective_of(compiled: Any) -> Orthogonality:
    """The orthogonality objective."""
    objective = compiled.steering.objectives["adalora"]
    assert isinstance(objective, Orthogonality)
    return objective


def gates(compiled: Any) -> dict[str, Tensor]:
    """Every tensor E, by name."""
    return {name: tensor for name, tensor in compiled.adapter_state_dict().items() if name.endswith(".E")}


def nonzero(compiled: Any) -> int:
    """The number of triplets that have an effect."""
    return sum(int((e != 0).sum()) for e in gates(compiled).values())


def train(compiled: Any, steps: int, total: int | None = None, first: int = 1) -> list[int]:
    """Train in a plain loop and return the number of triplets with an effect after each step."""
    parameters = [p for p in compiled.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=1e-2)
    if total is not None:
        compiled.begin(total)
    compiled.train()
    left = []
    for number in range(first, first + steps):
        inputs = {**inputs_for(compiled, seed=number), "labels": torch.arange(5) % 3}
        (compiled(**inputs).loss + compiled.extra_loss()).backward()
        optimiser.step()
        compiled.after_step()
        optimiser.zero_grad()
        left.append(nonzero(compiled))
    return left


@pytest.mark.full
def test_nonzeros_after_the_final_phase_equal_the_budget() -> None:
    """The budget is met exactly with and without a final phase, even if no interval ends on it."""
    for fields in ({}, {"final_steps": 3}, {"interval": 3, "warmup_steps": 2, "final_steps": 2}, {"interval": 50}):
        compiled = fresh("bert", varied(ADALORA, **fields))
        train(compiled, 11, total=11)
        assert nonzero(compiled) == budget_of(compiled).target == 4 * 2
        pattern = compiled.rank_pattern("adalora")
        assert sum(int(live.sum()) for live in pattern.values()) == 8
        assert all(live.shape == (6,) and live.dtype == torch.bool for live in pattern.values())
        assert compiled.merge().certificate.passed


@pytest.mark.full
def test_the_effective_count_is_that_of_the_triplets_left() -> None:
    """The number of parameters to ship is `sum r_k (in + out + 1)` over the pattern."""
    compiled = fresh("bert", ADALORA)
    train(compiled, 6, total=6)
    pattern = compiled.rank_pattern("adalora")
    sizes = {key: 48 + (80 if "output" in key else 48) + 1 for key in pattern}
    state = compiled.adapter_state_dict()
    shipped = 0
    for key, live in pattern.items():
        module = key.removesuffix(".weight")
        a, e, b = (state[f"{module}.graftc.adalora.{part}"] for part in "AEB")
        shipped += a[live].numel() + e[live].numel() + b[:, live].numel()
    assert shipped == sum(int(live.sum()) * sizes[key] for key, live in pattern.items())
    assert compiled.report.trainable_parameters == sum(6 * size for size in sizes.values())


@pytest.mark.slow
def test_budget_is_monotone_and_cubic() -> None:
    """The budget falls from all triplets to the target along the floored values of the formula and never rises."""
    budget = budget_of(fresh("bert", varied(ADALORA, warmup_steps=3, final_steps=4)))
    budget.begin(20)
    values = [budget.budget(number) for number in range(1, 21)]
    assert values == sorted(values, reverse=True)
    assert values[:3] == [24, 24, 24] and values[15:] == [8] * 5
    assert values[3:16] == [int(16 * (1 - (t - 3) / 13) ** 3 + 8) for t in range(4, 17)]


@pytest.mark.full
def test_masking_follows_the_budget_in_every_step() -> None:
    """With an interval of 1, each step that prunes leaves exactly the budget."""
    compiled = fresh("bert", varied(ADALORA, warmup_steps=1, final_steps=2))
    left = train(compiled, 10, total=10)
    assert left == [budget_of(compiled).budget(number) for number in range(1, 11)]


@pytest.mark.full
def test_selects_exactly_k_also_among_equals() -> None:
    """Exactly k triplets are kept even if all importances are equal, where a threshold would prune all of them."""
    compiled = fresh("bert", ADALORA)
    perturb(compiled)
    budget = budget_of(compiled)
    for count in (24, 23, 8, 1):
        budget._choose(count)
        assert sum(int(place.tensors["kept"].sum()) for place in budget.places) == count


@pytest.mark.full
def test_the_least_important_go() -> None:
    """Selection is global: a site may lose all its triplets."""
    compiled = fresh("bert", ADALORA)
    budget = budget_of(compiled)
    with torch.no_grad():
        for index, place in enumerate(budget.places):
            place.tensors["E_sensitivity"].copy_(torch.arange(6) + 10.0 * index)
            place.tensors["E_uncertainty"].fill_(1)
    budget._choose(8)
    assert [int(place.tensors["kept"].sum()) for place in budget.places] == [0, 0, 2, 6]
    assert budget.places[2].tensors["kept"].tolist() == [False] * 4 + [True] * 2


@pytest.mark.full
def test_importance_is_that_of_the_paper() -> None:
    """The importance at one site equals two steps of both moving averages, computed by hand."""
    compiled = fresh("bert", varied(ADALORA, beta1=0.8, beta2=0.6))
    perturb(compiled)
    budget = budget_of(compiled)
    place = budget.places[1]
    generator = torch.Generator().manual_seed(1)
    expected = {part: (0.0, 0.0) for part in "AEB"}
    for _ in range(2):
        for other in budget.places:
            for part in "AEB":
                tensor = other.tensors[part]
                tensor.grad = torch.randn(tensor.shape, generator=generator)
        for part, (mean, spread) in expected.items():
            tensor = place.tensors[part].detach()
            now = (tensor * place.tensors[part].grad).abs()
            mean = 0.8 * mean + 0.2 * now
            expected[part] = mean, 0.6 * spread + 0.4 * (now - mean).abs()
        with torch.no_grad():
            budget._observe()
    a, e, b = (mean * spread for mean, spread in expected.values())
    torch.testing.assert_close(budget.importance(place), e + a.mean(1) + b.mean(0), rtol=1e-6, atol=1e-9)


@pytest.mark.full
def test_the_final_phase_keeps_its_set() -> None:
    """Each final step keeps the same triplets, although their elements and gradients change."""
    compiled = fresh("bert", varied(ADALORA, final_steps=4))
    train(compiled, 7, total=12)
    importance = [budget_of(compiled).importance(place) for place in budget_of(compiled).places]
    train(compiled, 1, first=8)
    chosen = compiled.rank_pattern("adalora")
    before = {name: e.clone() for name, e in gates(compiled).items()}
    train(compiled, 4, first=9)
    after = compiled.rank_pattern("adalora")
    assert all(torch.equal(after[key], live) for key, live in chosen.items())
    assert any(not torch.equal(e, before[name]) for name, e in gates(compiled).items())
    assert budget_of(compiled).steps == 12
    for place, before_last in zip(budget_of(compiled).places, importance, strict=True):
        assert torch.equal(budget_of(compiled).importance(place), before_last)


@pytest.mark.full
def test_a_pruned_triplet_may_return_before() -> None:
    """A masked E still has a gradient and moves with the next step."""
    compiled = fresh("bert", ADALORA)
    train(compiled, 3, total=100)
    budget_of(compiled)._choose(1)
    with torch.no_grad():
        for place in budget_of(compiled).places:
            place.tensors["E"].mul_(place.tensors["kept"])
    assert nonzero(compiled) == 1
    assert train(compiled, 1, first=4)[0] > 1


@pytest.mark.full
def test_works_when_initial_and_target_rank_are_equal() -> None:
    """With equal ranks there is nothing to prune, and the number of steps is not needed."""
    compiled = fresh("bert", varied(ADALORA, rank=4, target_rank=4))
    left = train(compiled, 4)
    assert left == [16] * 4
    assert all(int(live.sum()) == 4 for live in compiled.rank_pattern("adalora").values())


@pytest.mark.slow
def test_pruning_a_triplet_changes_the_update_by_exactly_its_part() -> None:
    """The update `dW` loses `s E_i B_i A_i`."""
    compiled = fresh("bert", varied(ADALORA, alpha=5))
    state = perturb(compiled)
    a, e, b = (state[f"{QUERY}.graftc.adalora.{part}"] for part in "AEB")
    before = lazy_tensors(compiled.compilation).exact(f"{QUERY}.weight")
    part = 5 / (6 + 1e-5) * float(e[2]) * torch.outer(b[:, 2].double(), a[2].double())
    with torch.no_grad():
        e[2] = 0
    after = lazy_tensors(compiled.compilation).exact(f"{QUERY}.weight")
    torch.testing.assert_close(before - after, part, rtol=0, atol=1e-15)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.slow
def test_start() -> None:
    """E starts at zero, A and B normal with standard deviation 0.02."""
    compiled = fresh("llama", varied(ADALORA, "attn.q", rank=48, target_rank=1))
    state = compiled.adapter_state_dict()
    for name, tensor in state.items():
        if name.endswith((".A", ".B")):
            assert abs(float(tensor.std()) - 0.02) < 2e-3 and abs(float(tensor.mean())) < 2e-3
    assert all(not e.any() for e in gates(compiled).values())


@pytest.mark.slow
def test_orthogonality_is_zero_if_and_only_if_orthonormal() -> None:
    """The objective is zero with a finite gradient for orthonormal factors, and positive if one of them is not."""
    compiled = fresh("bert", ADALORA)
    objective = objective_of(compiled)
    with torch.no_grad():
        for place in objective.places:
            nn.init.orthogonal_(place.tensors["A"])
            nn.init.orthogonal_(place.tensors["B"])
    assert objective.value().item() < 1e-5
    objective.value().backward()
    assert all(bool(place.tensors[part].grad.isfinite().all()) for place in objective.places for part in "AB")
    for part in "AB":
        tensor = objective.places[1].tensors[part]
        with torch.no_grad():
            tensor.mul_(1.1)
            assert objective.value().item() > 1e-2
            tensor.div_(1.1)


@pytest.mark.full
def test_orthogonality_is_the_mean_of_norms_that_are_not_squared() -> None:
    """The objective is `weight / 2K` times the sum of `2K` Frobenius norms, with each expert counted separately."""
    compiled = fresh("mixtral", varied(ADALORA, ["attn.q", "experts"], orthogonality=0.3))
    state = perturb(compiled)
    norms = []
    for name, tensor in state.items():
        if name.endswith((".A", ".B")):
            for matrix in tensor.double().reshape(-1, *tensor.shape[-2:]):
                gram = matrix @ matrix.T if name.endswith(".A") else matrix.T @ matrix
                norms.append(((gram - torch.eye(6)) ** 2).sum().sqrt())
    assert len(norms) == 2 * (2 + 2 * 2 * 4)
    assert abs(compiled.extra_loss().item() - 0.3 * float(torch.stack(norms).mean())) < 1e-6


@pytest.mark.slow
def test_no_orthogonality_no_objective() -> None:
    """With weight 0 there is no objective, and the extra loss is zero."""
    compiled = fresh("bert", varied(ADALORA, orthogonality=0, rank=2))
    assert not compiled.steering.objectives
    assert float(compiled.extra_loss()) == 0


@pytest.mark.full
def test_overrides_change_the_budget() -> None:
    """Sites with other ranks contribute these to the budget."""
    compiled = fresh("bert", varied(ADALORA, overrides=[{"role": "attn.q", "rank": 4, "target_rank": 1}]))
    budget = budget_of(compiled)
    assert (budget.initial, budget.target) == (2 * 4 + 2 * 6, 2 * 1 + 2 * 2)
    train(compiled, 5, total=5)
    assert nonzero(compiled) == 6


@pytest.mark.full
def test_without_the_number_of_steps() -> None:
    """Without the number of steps the first step raises GC026, unless the spec contains it."""
    with pytest.raises(GraftError) as caught:
        train(fresh("bert", ADALORA), 1)
    assert caught.value.code == "GC026" and "compiled.begin" in (caught.value.hint or "")
    compiled = fresh("bert", varied(ADALORA, total_steps=4))
    train(compiled, 4)
    assert nonzero(compiled) == 8


@pytest.mark.full
def test_phases_that_leave_no_step() -> None:
    """Phases that leave no step raise GC026 when training begins, or when compiling if the spec gives the length of
    training; a target rank over the rank raises GC002, even if only for some sites. Each error names the field.
    """
    compiled = fresh("bert", varied(ADALORA, warmup_steps=5, final_steps=5))
    with pytest.raises(GraftError) as caught:
        compiled.begin(10)
    assert caught.value.code == "GC026" and "leave none of the 10" in caught.value.message
    compiled.begin(11)
    for fields, code, path in (
        ({"warmup_steps": 5, "final_steps": 5, "total_steps": 10}, "GC026", "warmup_steps"),
        ({"rank": 2, "target_rank": 3}, "GC002", "target_rank"),
        ({"overrides": [{"role": "attn.q", "rank": 1}]}, "GC002", "target_rank"),
    ):
        with pytest.raises(GraftError) as caught:
            fresh("bert", varied(ADALORA, **fields))
        assert caught.value.code == code
        assert caught.value.place is not None and caught.value.place.path == f"adapt[0].{path}"


@pytest.mark.full
def test_target_rank_by_default() -> None:
    """The target rank is 8 by default, or the rank if that is less."""
    for rank, expected in ((12, 8), (3, 3)):
        entry = {"method": "adalora", "target": {"role": "attn.q"}, "rank": rank}
        compiled = graftc.compile({"adapt": [entry]}, tiny("bert"))
        assert budget_of(compiled).target == 2 * expected


@pytest.mark.slow
def test_gradients_that_have_been_zeroed() -> None:
    """Calling `after_step` after `zero_grad` raises GC035."""
    compiled = fresh("bert", ADALORA)
    compiled.begin(5)
    compiled.extra_loss()
    with pytest.raises(GraftError) as caught:
        compiled.after_step()
    assert caught.value.code == "GC035"


def test_rank_over_the_layer() -> None:
    """A rank that exceeds the layer raises GC020 with the size of the site."""
    with pytest.raises(GraftError) as caught:
        fresh("bert", varied(ADALORA, rank=49))
    assert caught.value.code == "GC020" and "48 x 48" in caught.value.message


def test_a_base_in_float64_keeps_its_precision() -> None:
    """The objective and the importance are computed in float64."""
    compiled = graftc.compile({"adapt": [ADALORA]}, tiny("bert", dtype=torch.float64))
    perturb(compiled)
    compiled.begin(9)
    places = objective_of(compiled).places
    (compiled(**inputs_for(compiled), labels=torch.arange(5) % 3).loss + compiled.extra_loss()).backward()
    seen = [(place.tensors["E"] * place.tensors["E"].grad).detach().abs() for place in places]
    compiled.after_step()
    terms = []
    for place, importance in zip(places, seen, strict=True):
        a, b = place.tensors["A"], place.tensors["B"]
        terms += [(gram - torch.eye(6, dtype=torch.float64)).norm() for gram in (a @ a.T, b.T @ b)]
        expected = importance * (1 - place.spec.beta1)
        assert torch.allclose(place.tensors["E_sensitivity"], expected, rtol=1e-14, atol=0)
    expected = place.spec.orthogonality * torch.stack(terms).mean()
    assert torch.allclose(compiled.extra_loss(), expected, rtol=1e-14, atol=0)
    assert compiled.extra_loss().dtype == torch.float64
