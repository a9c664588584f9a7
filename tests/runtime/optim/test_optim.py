"""`graftc.optim`: AdamW with ages, and SM3, compared with torch and with their formulas."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import graftc
from graftc.passes.core.method.sparse_optimiser import Seen
from graftc.runtime.optim import sparse
from graftc.testing.families import tiny
from tests.kit.comparing import trainable
from tests.kit.models import fresh
from tests.kit.specs import varied

ULP = 2.0**-23
SPIEL = {"method": "spiel", "target": {"role": ["attn.q", "ffn.down"]}, "density": 0.05, "total_steps": 50}
NORM = {"method": "full", "target": {"modules": "transformer.ln_f"}, "dtype": "base"}
"""Trains as a copy."""


def set_gradients(parameters: dict[str, Any], number: int, scale: float = 1.0) -> None:
    """Set random gradients of very different sizes."""
    generator = torch.Generator().manual_seed(number)
    for p in parameters.values():
        size = 10 ** (4 * torch.rand(p.shape, generator=generator) - 3)
        p.grad = (scale * size * torch.randn(p.shape, generator=generator)).to(p.dtype)


@pytest.mark.full
@pytest.mark.parametrize("fields", [{}, {"weight_decay": 0.3, "betas": (0.8, 0.95), "eps": 1e-6, "lr": 3e-2}])
def test_without_replacements_it_is_torch_s_adamw(fields: dict[str, Any]) -> None:
    """Deltas, whose entries have ages, and other tensors agree after 60 steps to a few units in the last place."""
    ours, theirs = fresh("gpt2", SPIEL, NORM), fresh("gpt2", SPIEL, NORM)
    first = graftc.optim.AgedAdamW(ours, **fields)
    second = torch.optim.AdamW(list(trainable(theirs).values()), **fields)
    for number in range(60):
        for compiled, optimiser in ((ours, first), (theirs, second)):
            set_gradients(trainable(compiled), number)
            optimiser.step()
    expected = trainable(theirs)
    assert len(expected) == 6
    for name, p in trainable(ours).items():
        difference = (p.detach() - expected[name].detach()).abs().max()
        assert float(difference / expected[name].detach().abs().max()) <= 16 * ULP, name
        for key, state in (("exp_avg", first.state[p]), ("exp_avg_sq", first.state[p])):
            torch.testing.assert_close(state[key], second.state[expected[name]][key], rtol=4 * ULP, atol=1e-30)
    ages = [state["age"] for state in first.state.values() if "age" in state]
    assert len(ages) == 4 and all(age.dtype == torch.float32 and set(age.tolist()) == {60.0} for age in ages)


@pytest.mark.slow
def test_ages_correct_each_entry_for_itself() -> None:
    """A new entry first moves by the learning rate against its gradient's sign, however old the others are."""
    compiled = fresh("gpt2", SPIEL, NORM)
    optimiser = graftc.optim.AgedAdamW(compiled, lr=0.1, weight_decay=0.0, betas=(0.9, 0.9999))
    delta = next(p for name, p in trainable(compiled).items() if "delta" in name)
    places = torch.tensor([0, 3, 5])
    for number in range(5):
        set_gradients({"": delta}, number)
        optimiser.step()
    before = delta.detach().clone()
    optimiser.replaced(delta, places)
    state = optimiser.state[delta]
    assert not any(state[key][places].any() for key in ("age", "exp_avg", "exp_avg_sq"))
    set_gradients({"": delta}, 7)
    optimiser.step()
    moved = (delta.detach() - before)[places]
    torch.testing.assert_close(moved, -0.1 * delta.grad[places].sign(), rtol=1e-5, atol=0)
    assert state["age"][places].tolist() == [1, 1, 1] and state["age"][1] == 6


@cache
def shared() -> Any:
    """The model of all examples of a test."""
    return fresh("gpt2", SPIEL, NORM)


@pytest.mark.slow
@given(steps=st.integers(1, 20), size=st.floats(1e-6, 1e3))
@settings(max_examples=20, deadline=None)
def test_seeded_moments_are_those_of_a_constant_gradient(steps: int, size: float) -> None:
    """An entry that was observed for n steps continues like one that has trained for n steps."""
    compiled = shared()
    ours = graftc.optim.AgedAdamW(compiled, weight_decay=0.0)
    delta = next(p for name, p in trainable(compiled).items() if "delta" in name)
    other = nn.Parameter(torch.zeros(2))
    theirs = torch.optim.AdamW([other], weight_decay=0.0)
    g = torch.tensor([size, -2 * size])
    for _ in range(steps):
        other.grad = g.clone()
        theirs.step()
    with torch.no_grad():
        other.zero_()
        delta.zero_()
    ours.replaced(delta, torch.tensor([1, 4]), Seen(g, g * g, steps))
    for _ in range(3):
        delta.grad = torch.zeros_like(delta)
        delta.grad[[1, 4]] = other.grad = 0.3 * g
        ours.step()
        theirs.step()
    torch.testing.assert_close(delta.detach()[[1, 4]], other.detach(), rtol=1e-5, atol=0)


@pytest.mark.full
def test_state_is_wide_and_survives_a_state_dict() -> None:
    """On a bfloat16 base, the norm's copy is in 16 bits and no state is; loading restores states bit for bit."""
    for kind in (graftc.optim.AgedAdamW, graftc.optim.SM3):
        first, second = (fresh(tiny("gpt2", dtype=torch.bfloat16), SPIEL, NORM) for _ in range(2))
        one, two = kind(first, lr=1e-2), kind(second, lr=1e-2)
        for number in range(3):
            set_gradients(trainable(first), number)
            one.step()
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        for number in range(3, 6):
            for compiled, optimiser in ((first, one), (second, two)):
                set_gradients(trainable(compiled), number)
                optimiser.step()
        assert {p.dtype for p in trainable(first).values()} == {torch.bfloat16, torch.float32}
        for (name, p), q in zip(trainable(first).items(), trainable(second).values(), strict=True):
            assert torch.equal(p, q), name
            assert one.state[p].keys() == two.state[q].keys()
            assert all(torch.equal(one.state[p][k], two.state[q][k]) for k in one.state[p])
            assert all(tensor.dtype == torch.float32 for tensor in two.state[q].values())


def dense_sm3(p: Tensor, g: Tensor, axes: list[Tensor], lr: float, eps: float = 1e-8) -> Tensor:
    """Do a step of SM3-II on a tensor of any rank, entry by entry."""
    new = [torch.zeros_like(axis) for axis in axes]
    result = p.clone()
    for index in torch.cartesian_prod(*(torch.arange(n) for n in p.shape)).view(-1, p.dim()).tolist():
        at = tuple(index)
        bound = min(axis[i] for axis, i in zip(axes, at, strict=True)) + g[at] ** 2
        result[at] = p[at] - lr * g[at] / torch.sqrt(bound + eps)
        for axis, i in zip(new, at, strict=True):
            axis[i] = torch.maximum(axis[i], bound)
    for axis, value in zip(axes, new, strict=True):
        axis.copy_(value)
    return result


@pytest.mark.parametrize("shape", [(), (5,), (3, 4), (2, 3, 4)])
def test_sm3_on_tensors(shape: tuple[int, ...]) -> None:
    """Plain parameters have one accumulator for each axis."""
    generator = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=generator))
    optimiser = graftc.optim.SM3([p], lr=0.1)
    expected, axes = p.detach().clone(), [torch.zeros(n) for n in shape]
    total = torch.zeros(shape)
    for _ in range(6):
        p.grad = torch.randn(shape, generator=generator)
        total += p.grad**2
        optimiser.step()
        if shape:
            expected = dense_sm3(expected, p.grad, axes, 0.1)
        else:
            expected = expected - 0.1 * p.grad / torch.sqrt(total + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-5, atol=1e-6)
    assert set(optimiser.state[p]) == {f"axis_{i}" for i in range(max(1, len(shape)))}


@pytest.mark.full
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sm3_on_deltas(momentum: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """For entries in any order, bounds cover all squares that an entry has had, and accumulators only grow.

    Processing in chunks changes no bit.
    """
    compiled, again = (fresh("gpt2", varied(SPIEL, variant="MA"), NORM) for _ in range(2))
    optimiser = graftc.optim.SM3(compiled, lr=0.1, momentum=momentum)
    (name, delta), *_ = ((n, p) for n, p in trainable(compiled).items() if "c_proj" in n)
    base = compiled.get_parameter("transformer.h.0.mlp.c_proj.weight")
    order = torch.randperm(delta.numel(), generator=torch.Generator().manual_seed(1))
    for model in (compiled, again):
        indices = model.get_buffer(name.replace("_delta", "_indices"))
        indices.copy_(indices[order].clone())
    rows, columns = indices.long() // base.shape[1], indices.long() % base.shape[1]
    total, before, buffer = torch.zeros(delta.shape), delta.detach().clone(), torch.zeros(delta.shape)
    r, c = torch.zeros(base.shape[0]), torch.zeros(base.shape[1])
    for number in range(5):
        set_gradients({"": delta}, number)
        g = delta.grad
        total += g**2
        optimiser.step()
        bound = torch.minimum(r[rows], c[columns]) + g**2
        assert bool((bound * (1 + 1e-5) >= total).all())
        update = g / torch.sqrt(bound + 1e-8)
        buffer = momentum * buffer + (1 - momentum) * update
        before = before - 0.1 * (buffer if momentum else update)
        torch.testing.assert_close(delta.detach(), before, rtol=1e-5, atol=1e-6)
        accumulators = optimiser.accumulators(delta)
        assert accumulators is not None
        assert bool((accumulators[0] >= r).all()) and bool((accumulators[1] >= c).all())
        r, c = (a.clone() for a in accumulators)
        for i in range(delta.numel()):
            assert min(r[rows[i]], c[columns[i]]) >= bound[i] * (1 - 2 * ULP)
    monkeypatch.setattr(sparse, "CHUNK", 7)
    second = graftc.optim.SM3(again, lr=0.1, momentum=momentum)
    other = trainable(again)[name]
    for number in range(5):
        set_gradients({"": other}, number)
        second.step()
    assert torch.equal(other, delta)


@pytest.mark.slow
def test_indices_are_looked_up_when_they_are_needed() -> None:
    """Accumulators are those of the rows and columns where entries are now, after they have moved."""
    compiled = fresh("gpt2", varied(SPIEL, variant="MA"), NORM)
    optimiser = graftc.optim.SM3(compiled)
    (name, delta), *_ = ((n, p) for n, p in trainable(compiled).items() if "c_proj" in n)
    indices = compiled.get_buffer(name.replace("_delta", "_indices"))
    delta.grad = torch.ones_like(delta)
    optimiser.step()
    with torch.no_grad():
        indices.copy_(torch.arange(indices.numel()))
    delta.grad = torch.full_like(delta, 100.0)
    optimiser.step()
    accumulators = optimiser.accumulators(delta)
    assert accumulators is not None
    used = -(-indices.numel() // 48)
    assert bool((accumulators[0][:used] >= 1e4).all()) and bool((accumulators[0][used:] <= 1).all())


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["AgedAdamW", "SM3"])
def test_parameters_and_groups_are_taken_as_well(kind: str) -> None:
    """Groups may have settings of their own; without the model, the optimiser is not notified of new entries."""
    compiled = fresh("gpt2", SPIEL, NORM)
    parameters = trainable(compiled)
    deltas = [p for name, p in parameters.items() if "delta" in name]
    rest = [p for name, p in parameters.items() if "delta" not in name]
    (controller,) = compiled.steering.controllers.values()
    make = getattr(graftc.optim, kind)
    for loose in (make(iter(parameters.values())), make(rest, compiled=compiled)):
        assert controller.optimiser is None
        set_gradients(parameters, 0)
        loose.step()
        assert all("age" not in state for state in loose.state.values())
    grouped = make([{"params": deltas, "lr": 0.5}, {"params": rest}], lr=0.0, compiled=compiled)
    assert controller.optimiser is grouped and grouped.holds(deltas[0]) and not grouped.holds(torch.zeros(1))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    set_gradients(parameters, 1)
    grouped.step()
    for name, p in parameters.items():
        assert torch.equal(p, before[name]) == ("delta" not in name)
    latest = make(compiled)
    assert controller.optimiser is latest


@pytest.mark.slow
def test_fixed_entries_have_no_ages() -> None:
    """Entries of a mask are never replaced: a tensor has one count, and SM3 still has rows and columns."""
    spec = {"adapt": [{"method": "mask", "selection": "random", "density": 0.05, "target": {"role": "ffn.down"}}]}
    for kind, keys in (("AgedAdamW", {"step", "exp_avg", "exp_avg_sq"}), ("SM3", {"axis_0", "axis_1"})):
        compiled = graftc.compile(spec, tiny("gpt2"))
        optimiser = getattr(graftc.optim, kind)(compiled)
        set_gradients(trainable(compiled), 0)
        optimiser.step()
        weights = [p for name, p in trainable(compiled).items() if name.endswith("weight_delta")]
        assert weights and all(set(optimiser.state[p]) == keys for p in weights)


def test_a_closure_and_schedulers_work() -> None:
    """Closures and schedulers work as with any optimiser of torch."""
    p = nn.Parameter(torch.ones(3))
    for optimiser in (graftc.optim.AgedAdamW([p], lr=0.1), graftc.optim.SM3([p], lr=0.1)):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda number: 1 / (1 + number))

        def loss(optimiser: Any = optimiser) -> Tensor:
            optimiser.zero_grad()
            value = (p**2).sum()
            value.backward()
            return value

        values = []
        for _ in range(4):
            values.append(float(optimiser.step(loss).detach()))
            scheduler.step()
        assert values == sorted(values, reverse=True) and values[0] > values[-1]
        assert math.isclose(optimiser.param_groups[0]["lr"], 0.1 / 5)


def test_settings_out_of_bounds() -> None:
    """Settings out of bounds raise a ValueError that names them, as in torch."""
    p = nn.Parameter(torch.ones(3))
    for wrong in ({"lr": -1.0}, {"betas": (1.0, 0.9)}, {"eps": -1e-8}, {"weight_decay": float("nan")}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            graftc.optim.AgedAdamW([p], **wrong)
    for wrong in ({"lr": -1.0}, {"momentum": 1.0}, {"eps": -1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            graftc.optim.SM3([p], **wrong)


@pytest.mark.full
def test_the_facade_loads_it_when_it_is_used() -> None:
    """`import graftc` alone does not import torch, and the module is listed."""
    code = (
        "import sys, graftc; print('torch' in sys.modules, 'optim' in dir(graftc), 'optim' in graftc.__all__); "
        "print(graftc.optim.SM3.__name__, graftc.optim.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.split() == ["False", "True", "True", "SM3", "graftc.runtime.optim"]
