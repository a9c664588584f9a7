"""Fold steps compose in order, on the rows they own, and never write to the base."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.core.weights.folds import FoldStep, Keep, LazyTensors
from graftc.passes.core.weights.runs import Runs
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import Layout, WeightSlice
from graftc.passes.methods.lora import LoRAMethod
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny


def store(bias: bool = True) -> Store:
    """Return a Store with one map whose weight is 6 by 4."""
    result = Store()
    result.add_parameter("map.weight", torch.randn(6, 4), trainable=False)
    if bias:
        result.add_parameter("map.bias", torch.randn(6), trainable=False)
    return result


def step(apply: Any, rows: Runs | None = None, layout: Layout = Layout.ROWS) -> FoldStep:
    """Return a fold step on that map."""
    own = WeightSlice("map.weight", (6, 4) if layout is Layout.ROWS else (4, 6), layout, rows)
    return FoldStep("some", "map.weight", own, own.companion("map.bias"), apply)


def plus(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Add one to the weight."""
    return weight + 1, bias


def times(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Multiply the map's output by three."""
    return weight * 3, None if bias is None else bias * 3


def test_order_matters() -> None:
    """Adding and then scaling is not scaling and then adding."""
    base = store()
    weight, bias = base.get("map.weight").double(), base.get("map.bias").double()
    first, second = LazyTensors(base, [step(plus), step(times)]), LazyTensors(base, [step(times), step(plus)])
    assert torch.equal(first.exact("map.weight"), (weight + 1) * 3)
    assert torch.equal(second.exact("map.weight"), weight * 3 + 1)
    assert torch.equal(first.exact("map.bias"), bias * 3)
    assert first.names == ("map.weight", "map.bias")
    assert first.additions() == ()


def test_rounding_happens_once_at_the_end() -> None:
    """Steps that cancel restore the base bit for bit, which rounding in between would prevent."""
    base = store()
    third = [step(lambda w, b: (w / 3, b)), step(lambda w, b: (w * 3, b))]
    lazy = LazyTensors(base, third)
    assert torch.equal(lazy.folded("map.weight"), base.get("map.weight"))
    assert lazy.folded("map.weight").dtype is torch.float32
    assert lazy.exact("map.weight").dtype is torch.float64


def test_base_is_never_written() -> None:
    """Repeated folding leaves the Store's tensors unchanged, even if a step works in place."""
    base = store()
    before = base.get("map.weight").clone()

    def rude(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight.mul_(2), bias

    lazy = LazyTensors(base, [step(rude)])
    results = [lazy.folded("map.weight") for _ in range(2)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(base.get("map.weight"), before)


def test_rows_and_orientation() -> None:
    """A step sees only its own rows of ``[out, in]``, in whichever orientation the Store keeps the tensor."""
    base = Store()
    base.add_parameter("map.weight", torch.randn(4, 6), trainable=False)
    rows = ((1, 3), (5, 6))
    seen: list[tuple[int, ...]] = []

    def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        seen.append(tuple(weight.shape))
        return weight + torch.arange(3.0, dtype=torch.float64)[:, None] + 1, bias

    change = LazyTensors(base, [step(apply, rows, layout=Layout.COLUMNS)]).exact("map.weight") - base.get("map.weight")
    assert seen[0] == (3, 4)
    expected = torch.tensor([0.0, 1, 2, 0, 0, 3], dtype=torch.float64).expand(4, 6)
    torch.testing.assert_close(change, expected, rtol=0, atol=1e-12)


def test_bias_that_was_not_there() -> None:
    """A bias that a step creates is an addition, zero outside the step's rows; one that stays zero is none."""
    base = store(bias=False)
    adding = step(lambda w, b: (w, torch.full((2,), 7.0, dtype=torch.float64)), ((2, 4),))
    lazy = LazyTensors(base, [step(plus), adding])
    assert lazy.additions() == ("map.bias",)
    assert lazy.folded("map.bias").tolist() == [0, 0, 7, 7, 0, 0]
    assert LazyTensors(base, [step(plus), step(times)]).additions() == ()


@pytest.mark.slow
def test_two_adaptations_of_the_same_rows() -> None:
    """Two adaptations stacked in one spec both fold: the update is their sum."""
    model = tiny("gpt2")
    entry = {"method": "lora", "target": {"role": "attn.v"}, "rank": 3}
    spec = {"adapt": [{**entry, "name": "first"}, {**entry, "name": "second", "alpha": 5}]}
    compiled = graftc.compile(spec, model).eval()
    tensors = perturb(compiled)
    merged = compiled.merge()
    assert merged.certificate.sites[0].adaptations == ("first", "second")
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5
    module = "transformer.h.0.attn.c_attn"
    update = lazy_tensors(compiled.compilation).exact(f"{module}.weight") - model.get_parameter(f"{module}.weight")
    factors = [[tensors[f"{module}.graftc.{name}.v.{f}"].double() for f in "AB"] for name in ("first", "second")]
    expected = sum(scale / 3 * b @ a for scale, (a, b) in zip((16, 5), factors, strict=True))
    torch.testing.assert_close(update.T[96:], expected, rtol=0, atol=1e-7)
    assert not update.T[:96].any()


@pytest.mark.slow
def test_what_stays_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that cannot fold stops the merge with an error that names its reason and the site."""
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, tiny("llama"))
    monkeypatch.setattr(LoRAMethod, "fold", lambda *args: Keep("it is not linear"))
    with pytest.raises(GraftError, match="it is not linear") as error:
        compiled.merge()
    assert error.value.code == "GC050"
    assert "model.layers.0.self_attn.q_proj" in error.value.message
