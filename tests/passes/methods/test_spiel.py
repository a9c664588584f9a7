"""SpIEL's entries: their number, their choice, their replacement, and what a replacement changes."""

from __future__ import annotations

import copy
import math
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import graftc
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.passes.methods.bases.drop_and_grow import largest_products
from graftc.testing import outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.passes.methods.spiel_models import (
    ROLES,
    batch,
    changed,
    controller_of,
    entries_of,
    optimiser_for,
    spiel,
    train,
)
from tests.reference import spiel as reference

VARIANTS = ("AG", "MA")
PUBLISHED = {"interval": 20, "accumulation_steps": 5, "total_steps": 60}


def own_entries(region: WeightSlice) -> torch.Tensor:
    """Return the flat indices of the entries in a part of a matrix, computed by hand."""
    every = torch.arange(region.numel).view(region.shape)
    if region.layout is Layout.COLUMNS:
        every = every.T
    return torch.cat([every[start:stop].flatten() for start, stop in region.spans]).sort().values


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "variant", "steps", "fields"),
    [
        pytest.param("llama", "AG", 48, PUBLISHED),
        pytest.param("llama", "MA", 48, PUBLISHED),
        ("llama", "AG", 13, {"decay": "cosine", "drop_fraction": 0.4}),
        ("llama", "AG", 10, {"interval": 3, "accumulation_steps": 3, "drop_fraction": 0.4}),
        ("gpt2", "AG", 13, {"target": {"role": ["attn.q", "ffn.up"]}, "drop_fraction": 0.4}),
        ("gpt2", "MA", 13, {"target": {"role": ["attn.q", "ffn.up"]}, "drop_fraction": 0.4}),
        ("gpt2", "MA", 13, {"target": {"modules": "**"}, "decay": "cosine"}),
        pytest.param("gpt_neox", "MA", 9, {"target": {"role": "attn.v"}}),
    ],
)
def test_a_dense_reference_agrees(family: str, variant: str, steps: int, fields: dict[str, Any]) -> None:
    """Plain torch on dense tensors in float64 gives the same entries after every step, and deltas to 1e-5."""
    lr, decay = (1e-3, 0.1) if variant == "AG" else (1e-2, 0.0)
    compiled = fresh(tiny(family, dtype=torch.float64), spiel(variant=variant, **fields))
    spec, by_name = controller_of(compiled).spec, entries_of(compiled)
    assert spec.total_steps is not None
    own = {name: own_entries(entries.region) for name, entries in by_name.items()}
    known = reference.Settings(
        *(variant, spec.interval, spec.accumulation_steps, spec.drop_fraction, spec.decay, spec.total_steps),
        *({entries.region.tensor: own[name] for name, entries in by_name.items()}, lr, decay),
    )
    start = {entries.region.tensor: entries.tensor("indices").clone() for entries in by_name.values()}
    assert len(start) == len(by_name)

    def loss(model: Any, t: int) -> torch.Tensor:
        torch.manual_seed(t)
        result: torch.Tensor = model(**batch(compiled, t)).loss
        return result

    dense = reference.train(tiny(family, dtype=torch.float64), start, known, steps, loss)
    optimiser = optimiser_for(compiled, lr, **({"weight_decay": decay} if decay else {}))
    moved = 0
    for t in range(1, steps + 1):
        before = {name: entries.tensor("indices").clone() for name, entries in by_name.items()}
        train(compiled, optimiser, [t])
        for name, entries in by_name.items():
            indices = entries.tensor("indices").long()
            assert torch.equal(indices.sort().values, dense[entries.region.tensor].history[t - 1]), (name, t)
            moved += int((~torch.isin(indices, before[name])).sum())
    assert moved > 0
    for entries in by_name.values():
        own_dense = dense[entries.region.tensor]
        largest = float(own_dense.delta.abs().max())
        assert largest > 1e-4
        assert float((changed(entries) - own_dense.delta).abs().max()) <= 1e-5 * largest


@pytest.mark.slow
def test_counts_are_rounded_down_for_each_weight() -> None:
    """The budget is a share, a number, or a rank with as many parameters; indices are in order, and deltas zero."""
    sizes = [48 * 48, 48 * 80] * 2
    total, sides = sum(sizes), 2 * (48 + 48 + 48 + 80)
    for fields, budget in (
        ({"density": 0.07}, math.floor(Fraction("0.07") * total)),
        ({"entries": 1001}, 1001),
        ({"equivalent_rank": 3}, 3 * sides),
    ):
        compiled = fresh("llama", spiel(**fields))
        deltas = [entries.tensor("delta") for entries in controller_of(compiled).entries]
        assert [t.numel() for t in deltas] == [budget * size // total for size in sizes]
        assert all(not t.any() and t.dtype == torch.float32 for t in deltas)
        assert compiled.report.trainable_parameters == sum(t.numel() for t in deltas)
        for entries in controller_of(compiled).entries:
            indices = entries.tensor("indices")
            assert indices.dtype == torch.int32 and bool((indices[1:] > indices[:-1]).all())


@pytest.mark.full
def test_by_default_the_projections_of_layers_train() -> None:
    """Llama has seven of them; GPT-2's fused ones train as a whole; heads and maps outside of layers do not."""
    for family, names in (
        ("llama", {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}),
        ("gpt2", {"c_attn", "c_proj", "c_fc"}),
        ("bert", {"query", "key", "value", "dense"}),
        ("mixtral", {"q_proj", "k_proj", "v_proj", "o_proj"}),
    ):
        compiled = graftc.compile({"adapt": [{"method": "spiel"}]}, tiny(family))
        sites = [p.site for p in controller_of(compiled).places]
        assert {site.key.module.rpartition(".")[2] for site in sites} == names
        assert all(site.layer is not None for site in sites)
        assert compiled.report.trainable_parameters <= 0.01 * sum(
            e.region.numel for e in controller_of(compiled).entries
        )


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_first_replacement_takes_all(variant: str) -> None:
    """Deltas are zero afterwards, except for entries that are dropped and grown again, which are equal to the bit."""
    compiled = fresh("llama", spiel(variant=variant, density=0.3))
    optimiser = optimiser_for(compiled)
    train(compiled, optimiser, [1])
    snapshots: dict[str, Any] = {}
    original = compiled.after_step

    def looked() -> None:
        for name, entries in entries_of(compiled).items():
            snapshots[name] = entries.tensor("indices").clone(), entries.tensor("delta").clone()
        original()

    compiled._graftc.after_step = looked
    train(compiled, optimiser, [2])
    kept = 0
    for name, entries in entries_of(compiled).items():
        indices, delta = snapshots[name]
        assert bool(delta.any())
        stays = entries.tensor("indices") == indices
        assert not entries.tensor("delta")[~stays].any()
        assert torch.equal(entries.tensor("delta")[stays], delta[stays])
        assert not torch.isin(entries.tensor("indices")[~stays], indices).any()
        kept += int(stays.sum())
        if variant == "AG":
            state = optimiser.state[entries.tensor("delta")]
            assert set(state["age"][~stays].tolist()) == {2.0} == set(state["age"][stays].tolist())
    assert (kept > 0) == (variant == "AG")


def ended(compiled: Any) -> tuple[dict[str, Any], Any]:
    """Train up to the second replacement, which drops some entries; return the model before it and the optimiser."""
    optimiser = optimiser_for(compiled)
    train(compiled, optimiser, range(1, 6))
    before: dict[str, Any] = {}
    original = compiled.after_step

    def looked() -> None:
        before["model"] = copy.deepcopy(compiled)
        original()

    compiled._graftc.after_step = looked
    train(compiled, optimiser, [6])
    del compiled._graftc.after_step
    return before, optimiser


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_dropping_takes_deltas_away_and_growing_changes_nothing(variant: str, family: str) -> None:
    """To the bit, the outputs after a replacement are those of the earlier model with dropped deltas set to zero, and
    those of a plain model with the resulting weights.
    """
    compiled = fresh(family, spiel(variant=variant, target={"role": ["attn.q", "ffn.up"]}, density=0.2))
    before, _ = ended(compiled)
    earlier, model, moved = before["model"], tiny(family), 0
    for name, entries in entries_of(earlier).items():
        now = entries_of(compiled)[name]
        gone = now.tensor("indices") != entries.tensor("indices")
        count = entries.tensor("delta").numel()
        assert 0 < int(gone.sum()) <= math.floor(Fraction("0.2") * (1 - Fraction(6, 40)) * count)
        smallest = entries.tensor("delta").detach().abs().sort().values[: int(gone.sum())]
        assert variant == "AG" or torch.equal(entries.tensor("delta").detach()[gone].abs().sort().values, smallest)
        with torch.no_grad():
            entries.tensor("delta")[gone] = 0
            weight = model.get_parameter(entries.region.tensor)
            weight.view(-1).index_add_(0, entries.tensor("indices").long(), entries.tensor("delta"))
        assert torch.equal(changed(entries), changed(now))
        moved += int(gone.sum())
    assert moved
    inputs = inputs_for(compiled, seed=99)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(earlier, inputs))
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))


@pytest.mark.full
@settings(max_examples=12, deadline=None)
@given(data=st.data(), variant=st.sampled_from(VARIANTS), decay=st.sampled_from(["linear", "cosine"]))
def test_counts_places_and_bounds_hold_for_any_schedule(data: Any, variant: str, decay: str) -> None:
    """The number of entries is constant, each occurs once and belongs to the site, even if weights are nearly full."""
    interval = data.draw(st.integers(1, 5))
    schedule = {
        "interval": interval,
        "accumulation_steps": data.draw(st.integers(1, interval)),
        "drop_fraction": data.draw(st.floats(0, 1)),
        "total_steps": data.draw(st.integers(1, 14)),
        "density": data.draw(st.sampled_from([0.01, 0.3, 0.9, 1.0])),
        "decay": decay,
    }
    compiled = fresh("gpt2", spiel(variant=variant, target={"role": ["attn.k", "ffn.down"]}, **schedule))
    optimiser = optimiser_for(compiled)
    counts = {name: entries.tensor("indices").numel() for name, entries in entries_of(compiled).items()}
    for number in range(1, 11):
        train(compiled, optimiser, [number])
        for name, entries in entries_of(compiled).items():
            indices = entries.tensor("indices")
            assert indices.numel() == counts[name] == indices.unique().numel() == entries.tensor("delta").numel()
            assert torch.isin(indices, own_entries(entries.region)).all()
            assert entries.tensor("delta").isfinite().all()


@pytest.mark.full
def test_the_share_falls_to_zero() -> None:
    """The share is 1 at first, then follows the formulas, and is zero outside of the schedule and after its end."""
    controller = controller_of(fresh("llama", spiel(interval=20, accumulation_steps=5, total_steps=100)))
    assert controller.fraction(5) == 1
    assert [controller.fraction(t) for t in (25, 85)] == [Fraction(3, 20), Fraction(3, 100)]
    assert all(controller.fraction(t) == 0 for t in (1, 4, 6, 20, 24, 26, 105))
    controller.spec = controller.spec.model_copy(update={"decay": "cosine"})
    assert controller.fraction(25) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)))
    never = controller_of(fresh("llama", spiel(interval=5, accumulation_steps=5, total_steps=5)))
    assert [never.fraction(t) for t in range(1, 11)] == [0] * 10
    every = controller_of(fresh("llama", spiel(interval=5, accumulation_steps=5, total_steps=50)))
    assert [t for t in range(1, 26) if every.fraction(t)] == [5, 10, 15, 20, 25]


@pytest.mark.full
def test_among_equals_the_first_go() -> None:
    """With equal deltas, exactly as many entries as the share says are dropped, the first ones."""
    compiled = fresh("llama", spiel(drop_fraction=0.5, total_steps=1000, density=0.1))
    controller = controller_of(compiled)
    entries = controller.entries[1]
    with torch.no_grad():
        entries.tensor("delta").fill_(1)
        free = torch.arange(entries.region.numel, dtype=torch.int32)
        free = free[~torch.isin(free, entries.tensor("indices"))]
        entries.tensor("candidates").copy_(free[: entries.tensor("candidates").numel()])
        entries.tensor("sum").fill_(-2)
    before = entries.tensor("indices").clone()
    controller.shared["seen"].fill_(1)
    controller.shared["step"].fill_(5)
    with pytest.warns(graftc.GraftWarning, match="GC046"):
        controller.after_step()
    count = math.floor(controller.fraction(6) * before.numel())
    gone = entries.tensor("indices") != before
    assert gone.tolist() == [True] * count + [False] * (before.numel() - count)
    assert torch.equal(entries.tensor("indices")[:count], free[:count])


@pytest.mark.slow
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_largest_products_are_those_of_the_outer_product(data: Any) -> None:
    """A stable sort of all products agrees, for blocks of any height and parts of fused weights in both layouts."""
    import graftc.passes.methods.bases.drop_and_grow as module

    height, width = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 7))
    layout = data.draw(st.sampled_from([Layout.ROWS, Layout.COLUMNS]))
    outer = height if layout is Layout.ROWS else width
    start = data.draw(st.integers(0, outer - 1))
    rows = ((start, data.draw(st.integers(start + 1, outer))),)
    region = WeightSlice("weight", (height, width), layout, rows)
    own = own_entries(region)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    r, c = (torch.randint(0, 4, (n,), generator=generator).float() for n in (height, width))
    active = own[torch.randperm(own.numel(), generator=generator)[: data.draw(st.integers(0, own.numel()))]]
    count = data.draw(st.integers(0, own.numel()))
    score = torch.outer(r, c).flatten()
    free = own[~torch.isin(own, active)]
    expected = free[score[free].argsort(descending=True, stable=True)[:count]].sort().values
    block, module.BLOCK = module.BLOCK, data.draw(st.integers(1, 20))
    try:
        assert torch.equal(largest_products(region, active.int(), r, c, count), expected)
    finally:
        module.BLOCK = block


@pytest.mark.slow
def test_nothing_grows_into_what_is_not_finite() -> None:
    """Infinite sums and NaN are not candidates, and products of infinite accumulators stay in bounds."""
    compiled = fresh("llama", spiel(drop_fraction=1.0))
    controller = controller_of(compiled)
    controller.optimiser = optimiser_for(compiled)
    for entries in controller.entries:
        entries.tensor("candidates").copy_(torch.arange(entries.tensor("candidates").numel()))
        entries.tensor("sum").fill_(torch.nan)
        entries.tensor("sum")[::2] = torch.inf
    before = {name: entries.tensor("indices").clone() for name, entries in entries_of(compiled).items()}
    controller.shared["seen"].fill_(1)
    controller.shared["step"].fill_(5)
    controller.after_step()
    assert all(torch.equal(before[n], entries.tensor("indices")) for n, entries in entries_of(compiled).items())
    region = WeightSlice("weight", (2, 3))
    r, c = torch.tensor([torch.inf, 0.0]), torch.tensor([0.0, torch.inf, torch.nan])
    assert largest_products(region, torch.tensor([1]), r, c, 6).tolist() == [0, 2, 3, 4, 5]


@pytest.mark.full
@pytest.mark.parametrize("variant", VARIANTS)
def test_unselected_entries_are_the_base_s_after_weight_decay(variant: str) -> None:
    """AdamW decays only deltas: after merging, at most K entries differ from the base's bits, in bfloat16 as well."""
    for dtype in (torch.float32, torch.bfloat16):
        compiled = fresh(tiny("llama", dtype=dtype), spiel(variant=variant))
        decay = {"weight_decay": 0.5} if variant == "AG" else {}
        train(compiled, optimiser_for(compiled, **decay), range(1, 12))
        merged, base, trained = (
            compiled.merge().to_transformers().state_dict(),
            tiny("llama", dtype=dtype),
            entries_of(compiled),
        )
        for name, tensor in base.state_dict().items():
            same = (merged[name] == tensor).flatten()
            if name not in trained:
                assert same.all(), name
                continue
            assert not same.all()
            same[trained[name].tensor("indices").long()] = True
            assert same.all(), name
        assert all(entries.tensor("delta").dtype == torch.float32 for entries in trained.values())


@pytest.mark.full
def test_two_adaptations_of_one_weight() -> None:
    """Each of two adaptations of a weight reads the gradients and moves its own entries."""
    first = {"method": "spiel", "name": "one", "target": {"role": ROLES}, "density": 0.05, "interval": 4}
    first |= {"accumulation_steps": 2, "total_steps": 40}
    alone = graftc.compile({"adapt": [first]}, tiny("llama"))
    both = graftc.compile({"adapt": [first, {**first, "name": "two", "accumulation_steps": 3}]}, tiny("llama"))
    for compiled in (alone, both):
        train(compiled, graftc.optim.AgedAdamW(compiled, lr=0.0), range(1, 4))
    state, expected = both.adapter_state_dict(), alone.adapter_state_dict()
    for name, tensor in expected.items():
        if name.endswith("_indices"):
            assert torch.equal(state[name], tensor), name
    assert [n for n, p in both.named_parameters() if p.requires_grad and "graftc" not in n] == []
    assert any(
        not torch.equal(state[n.replace("two", "one")], t) for n, t in state.items() if ".two.weight_indices" in n
    )
    perturb(both)
    assert both.merge().certificate.passed
