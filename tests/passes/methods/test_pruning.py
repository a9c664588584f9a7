"""Pruning: kept entries, gradients, schedules, resumed training, and counts."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.methods.bases.pruning_controller import Penalty, PruningMasks, kept_entries
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.kit.training import adamw, train
from tests.passes.methods.pruned_models import PRUNING, ROLES, places_of

SCORED = ["movement", "soft_movement"]


def masks_of(compiled: Any) -> PruningMasks:
    """The controller of the masks."""
    controller = compiled.steering.controllers["pruning"]
    assert isinstance(controller, PruningMasks)
    return controller


@pytest.mark.full
def test_by_default_maps_of_layers_are_pruned() -> None:
    """Tables, norms, biases, poolers and heads are not pruned by default; a target may name a pooler."""
    sites = {str(place.site.key) for place in places_of(fresh("bert", {"method": "pruning"}))}
    model = tiny("bert")
    linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert sites == {name for name in linear if ".layer." in name}
    named = fresh("bert", {"method": "pruning", "target": {"modules": "**.pooler.*"}})
    assert [str(place.site.key) for place in places_of(named)] == ["bert.pooler.dense.weight"]


@pytest.mark.full
@pytest.mark.parametrize("variant", ["magnitude", "movement"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("density", [0.15, 0.07, 1e-4])
def test_exactly_the_share_of_each_matrix_is_kept(variant: str, dtype: torch.dtype, density: float) -> None:
    """The number is rounded down, but at least one, even with equal scores; the other folded entries are zero."""
    compiled = fresh(tiny("bert").to(dtype), varied(PRUNING, variant=variant, density=density, total_steps=1))
    perturb(compiled)
    with torch.no_grad():
        for place in places_of(compiled):
            scores = place.tensors["weight" if variant == "magnitude" else "weight_scores"]
            scores.copy_((scores * 20).round() / 20 + (0.5 if variant == "magnitude" else 0))
    compiled.after_step()
    merged = dict(compiled.eval().merge().to_transformers().named_parameters())
    for place in places_of(compiled):
        kept = kept_entries(place)
        assert int(kept.sum()) == max(1, math.floor(Fraction(str(density)) * kept.numel()))
        assert torch.equal(merged[str(place.site.key)], place.tensors["weight"].where(kept, 0).to(dtype))


@pytest.mark.full
def test_every_expert_has_its_share_and_rows_have_theirs() -> None:
    """Stacked matrices are pruned one by one, and rows of a fused weight on their own."""
    compiled = fresh("mixtral", varied(PRUNING, "experts", density=0.25, total_steps=1))
    perturb(compiled)
    compiled.after_step()
    for place in places_of(compiled):
        kept = kept_entries(place).flatten(1)
        assert kept.sum(1).tolist() == [kept.shape[1] // 4] * kept.shape[0]
    fused = fresh("gpt_neox", varied(PRUNING, "attn.k", density=0.25, total_steps=1))
    perturb(fused)
    fused.after_step()
    certificate = fused.eval().merge().certificate
    assert certificate.passed and {int(kept_entries(p).sum()) for p in places_of(fused)} == {48 * 48 // 4}


@pytest.mark.full
@pytest.mark.parametrize(("target", "kept"), [({"role": "attn.q"}, 1152), ({"modules": "**.c_attn"}, 3456)], ids=str)
def test_columns(target: dict[str, Any], kept: int) -> None:
    """Part of a fused weight that is stored transposed is pruned, or all of it."""
    compiled = fresh("gpt2", {"method": "pruning", "target": target, "density": 0.5, "total_steps": 1})
    perturb(compiled)
    compiled.after_step()
    assert compiled.eval().merge().certificate.passed
    assert {int(kept_entries(p).sum()) for p in places_of(compiled)} == {kept}


@pytest.mark.slow
def test_all_matrices_together() -> None:
    """Exactly the share of all entries is kept, the largest of them."""
    compiled = fresh("bert", varied(PRUNING, variant="magnitude", density=0.1, allocation="global", total_steps=1))
    with torch.no_grad():
        places_of(compiled)[0].tensors["weight"].mul_(1e-3)
    compiled.after_step()
    kept = [kept_entries(place).flatten() for place in places_of(compiled)]
    every = torch.cat([place.tensors["weight"].detach().abs().flatten() for place in places_of(compiled)])
    count = math.floor(every.numel() / 10)
    assert int(torch.cat(kept).sum()) == count and not kept[0].any()
    assert torch.equal(torch.cat(kept).nonzero().flatten(), every.topk(count).indices.sort().values)
    assert compiled.report.deployed_parameters == count
    assert compiled.eval().merge().certificate.passed


@pytest.mark.full
@pytest.mark.parametrize("allocation", ["per_tensor", "global"])
def test_pruned_before_it_trains(allocation: str) -> None:
    """An initial density applies from the first pass, and a constant one needs no number of steps."""
    compiled = fresh(
        "bert", varied(PRUNING, variant="magnitude", density=0.3, initial_density=0.3, allocation=allocation)
    )
    sizes = [kept_entries(place).numel() for place in places_of(compiled)]
    kept = [int(kept_entries(place).sum()) for place in places_of(compiled)]
    if allocation == "per_tensor":
        assert kept == [math.floor(size * 0.3) for size in sizes]
    else:
        assert sum(kept) == math.floor(sum(sizes) * Fraction("0.3"))
    train(compiled, adamw(compiled, lr=5e-3), range(2))
    assert sum(int(kept_entries(place).sum()) for place in places_of(compiled)) == sum(kept)


@pytest.mark.slow
def test_with_everything_kept_it_is_the_base() -> None:
    """Density 1 has no controller and no scores."""
    model = tiny("bert").eval()
    compiled = fresh(model, varied(PRUNING, density=1.0)).eval()
    assert not compiled.steering.controllers and not any("scores" in n for n in compiled.adapter_state_dict())
    assert same_bits(outputs_of(compiled, inputs_for(compiled)), outputs_of(model, inputs_for(compiled)))


@pytest.mark.full
@pytest.mark.parametrize("variant", ["magnitude", *SCORED])
def test_gradients_are_those_of_dense_tensors(variant: str) -> None:
    """Gradients follow from those of the source model with `W * M`, in float64: `dW = dW' * M` and `dS = dW' * W`."""
    model = tiny("bert").double()
    threshold = {"threshold": 0.501} if variant == "soft_movement" else {"density": 0.3}
    compiled = fresh(model, varied(PRUNING, "attn.q", variant=variant, total_steps=1, **threshold))
    perturb(compiled)
    compiled.extra_loss()
    compiled.after_step()
    compiled.eval()
    inputs = {**inputs_for(compiled), "labels": torch.arange(5) % 3}
    compiled(**inputs).loss.backward()
    dense = copy.deepcopy(model).eval().requires_grad_(False)
    pruned = {}
    for place in places_of(compiled):
        kept = kept_entries(place)
        layer = dense.get_submodule(place.site.key.module)
        assert isinstance(layer, nn.Linear) and bool(kept.any()) and not bool(kept.all())
        layer.weight = nn.Parameter(place.tensors["weight"].detach() * kept)
        pruned[layer] = place, kept
    dense(**inputs).loss.backward()
    for layer, (place, kept) in pruned.items():
        weight, grad = place.tensors["weight"], layer.weight.grad
        assert grad is not None
        torch.testing.assert_close(weight.grad, grad * kept, rtol=1e-10, atol=1e-14)
        assert not weight.grad[~kept].any()
        if variant != "magnitude":
            scores = place.tensors["weight_scores"]
            torch.testing.assert_close(scores.grad, grad * weight.detach(), rtol=1e-10, atol=1e-14)
            assert bool(scores.grad[~kept].any())


@pytest.mark.full
def test_a_weight_that_moves_away_from_zero_gains() -> None:
    """After a descent step on both, a score is positive if its weight has moved away from zero, else negative."""
    compiled = fresh("bert", varied(PRUNING, density=0.5, total_steps=100, warmup_steps=10))
    optimiser = torch.optim.SGD([p for p in compiled.parameters() if p.requires_grad], lr=1e-2)
    before = [place.tensors["weight"].detach().clone() for place in places_of(compiled)]
    train(compiled, optimiser, range(1))
    for place, old in zip(places_of(compiled), before, strict=True):
        new, scores = place.tensors["weight"].detach(), place.tensors["weight_scores"].detach()
        moved = new != old
        away = (new - old).sign() * old.sign()
        assert bool(moved.any()) and torch.equal(scores.sign()[moved], away[moved])


@pytest.mark.slow
def test_the_density_falls_in_a_cubic_curve() -> None:
    """The schedule has the right corners, and the right values between them."""
    masks = masks_of(fresh("bert", varied(PRUNING, density=0.2, warmup_steps=3, final_steps=4)))
    masks.begin(20)
    shares = [masks.density(number) for number in range(1, 25)]
    assert shares[:3] == [1, 1, 1] and shares[15:] == [Fraction("0.2")] * 9
    for number in range(4, 16):
        assert abs(float(shares[number - 1]) - (0.2 + 0.8 * (1 - (number - 3) / 13) ** 3)) < 1e-12
    assert shares == sorted(shares, reverse=True)


@pytest.mark.slow
def test_the_threshold_and_the_penalty_rise_likewise() -> None:
    compiled = fresh("bert", varied(PRUNING, variant="soft_movement", warmup_steps=2, final_steps=2, total_steps=10))
    masks, shared = masks_of(compiled), masks_of(compiled).shared
    assert compiled.extra_loss().item() == 0
    for number in range(1, 12):
        risen = 1 - (1 - min(max(number - 2, 0) / 6, 1)) ** 3
        compiled.after_step()
        assert abs(masks.threshold(number) - 0.1 * risen) < 1e-12
        assert abs(float(shared["penalty"]) - 400 * risen) < 1e-3
        with torch.no_grad():
            for place in masks.places:
                place.tensors["weight_scores"].fill_(math.log(3))
        assert abs(compiled.extra_loss().item() - 400 * risen * 0.75) < 1e-3


@pytest.mark.slow
def test_soft_movement_keeps_what_exceeds_the_threshold() -> None:
    """If no score exceeds the threshold, the largest half a percent is kept."""
    compiled = fresh("bert", varied(PRUNING, variant="soft_movement", threshold=0.4, total_steps=1))
    generator = torch.Generator().manual_seed(0)
    places = places_of(compiled)
    with torch.no_grad():
        for place in places:
            place.tensors["weight_scores"].normal_(generator=generator)
        places[0].tensors["weight_scores"].sub_(100)
    compiled.extra_loss()
    compiled.after_step()
    least, scores = kept_entries(places[0]), places[0].tensors["weight_scores"].detach()
    assert int(least.sum()) == math.floor(0.005 * least.numel())
    assert float(scores[least].min()) >= float(scores[~least].max())
    for place in places[1:]:
        assert torch.equal(kept_entries(place), place.tensors["weight_scores"].sigmoid() > 0.4)
    kept = sum(int(kept_entries(place).sum()) for place in places)
    assert compiled.report.deployed_parameters == kept
    assert isinstance(compiled.steering.objectives["pruning"], Penalty)


@pytest.mark.full
def test_counts() -> None:
    """Weights and scores train, and the entries kept in the end are deployed, with other shares at some sites."""
    fields = {"density": 0.15, "overrides": [{"role": "ffn.down", "density": 0.5}]}
    compiled = fresh("bert", varied(PRUNING, **fields))
    down, query = 80 * 48, 48 * 48
    assert compiled.report.trainable_parameters == 2 * 2 * (down + query)
    assert compiled.report.deployed_parameters == 2 * (down // 2 + math.floor(0.15 * query))
    by_magnitude = fresh("bert", varied(PRUNING, variant="magnitude", **fields))
    assert by_magnitude.report.trainable_parameters == 2 * (down + query)
    entry = {"method": "pruning", "target": {"role": ROLES}, **fields}
    with torch.device("meta"):
        model = tiny("bert").to("meta")
    assert graftc.check({"adapt": [entry]}, model).deployed_parameters == compiled.report.deployed_parameters


@pytest.mark.full
@pytest.mark.parametrize("variant", ["magnitude", *SCORED])
def test_a_resumed_training_ends_the_same(variant: str, tmp_path: Path) -> None:
    """After saving, loading and further training every tensor is equal to the bit, including thresholds."""

    def pruned() -> Compiled:
        penalty = {"penalty": 1.0} if "soft" in variant else {}
        return fresh("bert", varied(PRUNING, variant=variant, total_steps=6, warmup_steps=1, **penalty))

    uninterrupted, first = pruned(), pruned()
    train(uninterrupted, adamw(uninterrupted, lr=5e-3), range(6))
    optimiser = adamw(first, lr=5e-3)
    train(first, optimiser, range(3))
    first.save(tmp_path / "artifact", certify=False)
    second = graftc.load(tmp_path / "artifact", tiny("bert"))
    resumed = adamw(second, lr=5e-3)
    resumed.load_state_dict(copy.deepcopy(optimiser.state_dict()))
    train(second, resumed, range(3, 6))
    expected, actual = uninterrupted.adapter_state_dict(), second.adapter_state_dict()
    assert expected.keys() == actual.keys()
    assert all(torch.equal(actual[name], tensor) for name, tensor in expected.items())


@pytest.mark.full
def test_checkpointing_changes_no_bit() -> None:
    """Recomputed layers have the same masks."""
    ends = []
    for checkpoint in (False, True):
        compiled = fresh("bert", varied(PRUNING, total_steps=4))
        if checkpoint:
            compiled.gradient_checkpointing_enable()
        train(compiled, adamw(compiled, lr=5e-3), range(4))
        ends.append(compiled.adapter_state_dict())
    assert all(torch.equal(ends[0][name], tensor) for name, tensor in ends[1].items())


@pytest.mark.full
def test_beside_others() -> None:
    """A low-rank update adds to a pruned weight, and adaptations elsewhere train."""
    adapt = [
        {"method": "lora", "target": {"role": ROLES}},
        {"method": "pruning", "target": {"role": ROLES}, "density": 0.3, "total_steps": 1},
        {"method": "bitfit"},
    ]
    compiled = graftc.compile({"adapt": adapt}, tiny("bert"))
    perturb(compiled)
    compiled.after_step()
    assert compiled.eval().merge().certificate.passed
    for entry in ({"method": "full"}, {"method": "mask", "selection": "random"}):
        for both in ([adapt[1], entry], [entry, adapt[1]], [{**ITERATED, "stage": 2}, entry]):
            with pytest.raises(GraftError) as caught:
                graftc.compile({"adapt": both}, tiny("bert"))
            assert caught.value.code == "GC021"


ITERATED: dict[str, Any] = {"method": "pruning", "variant": "iterative", "target": {"role": ROLES}}


@pytest.mark.parametrize(
    ("fields", "code", "path"),
    [
        ({"variant": "soft_movement", "density": 0.2}, "GC002", "density"),
        ({"rounds": 3}, "GC002", "rounds"),
        ({"penalty": 3.0}, "GC002", "penalty"),
        ({"initial_density": 0.5}, "GC002", "initial_density"),
        ({"variant": "magnitude", "initial_density": 0.1}, "GC002", "initial_density"),
        ({"variant": "soft_movement", "initial_threshold": 0.2}, "GC002", "initial_threshold"),
        ({"variant": "iterative", "density": 0.2, "fraction": 0.2}, "GC002", "fraction"),
        ({"variant": "iterative", "rounds": 2, "stage": 4}, "GC002", "stage"),
        ({"variant": "iterative", "warmup_steps": 4}, "GC002", "warmup_steps"),
        ({"allocation": "global", "overrides": [{"role": "attn.q", "density": 0.5}]}, "GC002", "overrides"),
        ({"warmup_steps": 5, "final_steps": 5, "total_steps": 10}, "GC026", "warmup_steps"),
    ],
)
def test_values_that_do_not_fit(fields: dict[str, Any], code: str, path: str) -> None:
    """Each error names its field."""
    with pytest.raises(GraftError) as caught:
        fresh("bert", varied(PRUNING, **fields))
    assert caught.value.code == code
    assert caught.value.place is not None and caught.value.place.path == f"adapt[0].{path}"


@pytest.mark.slow
def test_without_the_number_of_steps() -> None:
    """GC026 is raised at the first step without a number of steps, and for a number that the phases use up."""
    compiled = fresh("bert", varied(PRUNING, warmup_steps=3, final_steps=3))
    with pytest.raises(GraftError) as caught:
        train(compiled, adamw(compiled, lr=5e-3), range(1))
    assert caught.value.code == "GC026" and "compiled.begin" in (caught.value.hint or "")
    with pytest.raises(GraftError) as caught:
        compiled.begin(6)
    assert caught.value.code == "GC026"


@pytest.mark.full
def test_what_is_pruned_may_come_back() -> None:
    """With movement, a pruned entry can be kept later, since its score still trains."""
    compiled = fresh("bert", varied(PRUNING, density=0.5, total_steps=4))
    before: dict[str, Tensor] = {}
    returned = 0
    optimiser = adamw(compiled, lr=5e-3)
    for number in range(8):
        train(compiled, optimiser, range(number, number + 1))
        now = {str(place.site.key): kept_entries(place) for place in places_of(compiled)}
        returned += sum(int((now[name] & ~old).sum()) for name, old in before.items())
        before = now
    assert returned > 0
