"""A certificate that never fails proves nothing: every wrong way of folding must be caught."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.compiler.folding import fold_plan, rounding
from graftc.compiler.folding import steps as folding
from graftc.passes.core.weights.folds import FoldStep, WeightFold
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.lora import LoRAMethod
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import outputs_of, same_bits
from graftc.testing.compare import inputs_for
from tests.kit.models import adapted
from tests.kit.refusals import refused
from tests.kit.specs import lora

WITHOUT_LIMIT = 1e9
"""A budget of outputs that everything keeps to, so that only the evidence at the sites is left."""


def corrupt(monkeypatch: pytest.MonkeyPatch, change: Callable[[Tensor], Tensor]) -> None:
    """Make LoRA's fold add ``change(delta)`` instead of ``delta``."""
    original = LoRAMethod.fold

    def fold(self: LoRAMethod, spec: Any, site: Any, tensors: Any) -> WeightFold:
        inner = original(self, spec, site, tensors)
        assert isinstance(inner, WeightFold)

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            folded, new_bias = inner.apply(weight, bias)
            return weight + change(folded - weight), new_bias

        return WeightFold(apply)

    monkeypatch.setattr(LoRAMethod, "fold", fold)


def reasons_against(compiled: Any) -> tuple[str, ...]:
    """Check that merging raises GC051 under any budget of outputs and changes nothing; return the reasons."""
    source = compiled.compilation.model
    before = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    inputs = inputs_for(compiled)
    outputs = outputs_of(compiled, inputs)
    error = refused(compiled.merge, budget=WITHOUT_LIMIT, code="GC051")
    assert all(torch.equal(tensor, before[name]) for name, tensor in source.state_dict().items())
    assert same_bits(outputs_of(compiled, inputs), outputs)
    return error.details


def passes(compiled: Any) -> bool:
    """Return whether the unmodified fold is certified."""
    return bool(compiled.merge().certificate.passed)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda delta: delta.T,
    "rescaled": lambda delta: 1.001 * delta,
    "negated": lambda delta: -delta,
    "left out": lambda delta: 0 * delta,
    "rows rolled": lambda delta: delta.roll(1, 0),
    "columns rolled": lambda delta: delta.roll(1, 1),
    "single precision": lambda delta: delta.float().double(),
}


@pytest.mark.full
@pytest.mark.parametrize("name", CHANGES)
def test_wrong_weight(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """``attn.q`` of BERT is square, so a transposed update fits: only its values are wrong."""
    compiled = adapted("bert", lora("attn.q", rank=4))
    assert passes(compiled)
    corrupt(monkeypatch, CHANGES[name])
    reasons = reasons_against(compiled)
    assert all("attention.self.query" in reason for reason in reasons)
    assert len(reasons) == 2


@pytest.mark.slow
def test_one_wrong_site_of_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single wrong element at one site of one layer is reported for that site alone."""
    compiled = adapted("llama", lora(["attn.q", "ffn.down"], rank=4))
    in_order = folding.in_order

    def wrong(every: Iterable[folding.OwnSteps]) -> list[FoldStep]:
        steps = in_order(every)
        if not steps:
            return steps
        last = steps[-1]

        def apply(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
            folded, new_bias = last.apply(weight, bias)
            folded[3, 5] += 1e-6
            return folded, new_bias

        return [*steps[:-1], FoldStep(**{**vars(last), "apply": apply})]

    for module in (folding, fold_plan):
        monkeypatch.setattr(module, "in_order", wrong)
    (reason,) = reasons_against(compiled)
    assert reason.startswith("model.layers.1.mlp.down_proj.weight")


@pytest.mark.slow
def test_small_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """An update far below the budget of outputs is checked as strictly as a large one."""
    compiled = adapted("bert", lora("attn.q", rank=4), noise=1e-3)
    assert passes(compiled)
    corrupt(monkeypatch, CHANGES["rescaled"])
    assert len(reasons_against(compiled)) == 2


@pytest.mark.slow
def test_wrong_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing the update of GPT-2's query to the rows of the key, which have the same shape, is caught."""
    compiled = adapted("gpt2", lora("attn.q", rank=4))
    assert passes(compiled)

    def shifted(*args: Any, **kwargs: Any) -> FoldStep:
        step = FoldStep(*args, **kwargs)
        assert step.bias is not None
        return replace(step, weight=step.weight.at(((48, 96),)), bias=step.bias.at(((48, 96),)))

    monkeypatch.setattr(folding, "FoldStep", shifted)
    assert all("c_attn" in reason for reason in reasons_against(compiled))


@pytest.mark.slow
def test_rows_of_another_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Writing to more than the site's own rows is caught, even though the site's own rows are right."""
    compiled = adapted("gpt2", lora("attn.q", rank=4))
    put = WeightSlice.put

    def spilling(self: WeightSlice, stored: Tensor | None, own: Tensor) -> Tensor:
        result = put(self, stored, own)
        return result if self.whole else torch.cat([result[..., :-1], 1.0001 * result[..., -1:]], -1)

    monkeypatch.setattr(WeightSlice, "put", spilling)
    assert all("c_attn" in reason for reason in reasons_against(compiled))


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_without_bias(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaving out the trained biases of adapted layers is caught."""
    compiled = adapted(family, lora("attn.q", rank=4, bias="lora_only"))
    assert passes(compiled)
    monkeypatch.setattr(folding, "_overlay_steps", lambda compilation, name, read: [])
    assert reasons_against(compiled)


@pytest.mark.slow
def test_rounded_down(monkeypatch: pytest.MonkeyPatch) -> None:
    """Truncating instead of rounding is caught: errors are at most one unit in the last place, but over half of one."""
    compiled = adapted("bert", lora("attn.q", rank=4))

    def cut(exact: Tensor, dtype: torch.dtype, *_: Tensor) -> Tensor:
        nearest = exact.to(dtype)
        over = nearest.double().abs() > exact.abs()
        return torch.where(over, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)

    monkeypatch.setattr(rounding, "_shortened", cut)
    assert all("rounding" in reason for reason in reasons_against(compiled))


@pytest.mark.slow
def test_over_the_budget() -> None:
    """A correct fold is refused under a budget that no rounding can meet, and the error names the output."""
    compiled = adapted("bert", lora("attn.q", rank=4))
    with pytest.raises(GraftError) as error:
        compiled.merge(budget=0.0)
    assert error.value.code == "GC051"
    assert "logits" in error.value.message


@pytest.mark.slow
def test_nothing_is_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Merging followed by exporting stops at the certificate, before any file is written."""
    compiled = adapted("bert", lora("attn.q", rank=4))
    corrupt(monkeypatch, CHANGES["transposed"])
    with pytest.raises(GraftError, match="GC051"):
        compiled.merge().export(tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())
