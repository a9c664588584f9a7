"""A model that amplifies its own rounding is compared in float64: a right fold passes, and a wrong one does not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from graftc.passes.core.ops.route import Routes
from graftc.runtime.deploy import folded_runner
from graftc.runtime.deploy.comparing import compared
from graftc.runtime.deploy.folded_tensors import folded_store
from graftc.runtime.deploy.merged import FoldRequest, fold
from graftc.runtime.model.evaluation import Evaluation
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.testing import perturb, tiny
from tests.kit.models import adapted
from tests.kit.refusals import refused
from tests.kit.specs import lora
from tests.runtime.deploy.routed import FAMILIES, near_twins, routed_model

LARGE = 3e4
"""The size of a weight that the update nearly cancels."""


class Cancels(nn.Module):
    """A model whose first map is large and nearly cancelled by its update.

    Unfolded, the sum of two large outputs is rounded; folded, nothing is large, and no rounding of the small weights
    moves the outputs by as much.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


def cancelling(**spec: Any) -> Any:
    """Return the compiled model, with other keys of the spec."""
    torch.manual_seed(0)
    compiled = adapted(
        Cancels().eval(), lora(modules="**.first", alpha=2), inputs={"x": torch.randn(64, 6)}, cache=False, **spec
    )
    cancel(compiled, "first")
    return compiled


def cancel(compiled: Any, module: str) -> None:
    """Make a map's weight and its update large, with a sum as before."""
    a, b = (compiled.get_parameter(f"{module}.graftc.lora.{part}") for part in "AB")
    weight = compiled.get_parameter(f"{module}.weight")
    with torch.no_grad():
        a.mul_(LARGE / float(a.abs().max()))
        b.copy_(torch.rand_like(b) + 0.5)
        weight.sub_(b @ a)


def plant(monkeypatch: pytest.MonkeyPatch, size: float) -> None:
    """Change one entry of a folded weight after the fold has been checked."""

    def wrong(compilation: Any, plan: Any, folds: Any, packed: Any, **options: Any) -> Any:
        tensors = {name: tensor.clone() for name, tensor in folds.tensors.items()}
        tensors["first.weight"][2, 3] += size
        return folded_store(compilation, plan, replace(folds, tensors=tensors), packed, **options)

    monkeypatch.setattr(folded_runner, "folded_store", wrong)


def comparison_of(compiled: Any) -> Any:
    """Return the comparison of a model with its fold."""
    merged = fold(compiled._graftc, FoldRequest(budget=1e9))
    return compared(compiled._graftc, merged._graftc)


def test_a_right_fold_is_certified_however_rounding_is_amplified() -> None:
    with pytest.warns(GraftWarning, match="the fold is right, but outputs differ from before") as caught:
        certificate = cancelling().merge().certificate
    assert [item.message.code for item in caught] == ["GC169"]
    assert certificate.passed and certificate.budget < 1e-3, "nothing is allowed beyond the usual budget"
    assert certificate.largest_difference < certificate.budget / 100
    (note,) = certificate.notes
    assert "compared in float64; in float32 they differ by" in note


def test_outputs_that_rounding_moves_by_their_own_size_prove_little() -> None:
    """A chaotic map: rounding the folded weight differently moves its outputs as far as they go."""

    class Chaotic(Cancels):
        def forward(self, x: Tensor) -> Tensor:
            value = torch.sigmoid(self.first(x))
            for _ in range(60):
                value = 3.99 * value * (1 - value)
            return self.last(value)

    torch.manual_seed(0)
    compiled = adapted(Chaotic().eval(), lora(modules="**.first"), inputs={"x": torch.randn(64, 6)}, cache=False)
    perturb(compiled)
    with pytest.warns(GraftWarning, match="their comparison proves little") as caught:
        certificate = compiled.merge().certificate
    assert [item.message.code for item in caught] == ["GC169"]
    assert all(site.algebra < 1e-6 for site in certificate.sites)


@pytest.mark.parametrize("size", [1e-3, -1e-2, 1.0])
def test_a_wrong_weight_is_found_below_the_rounding(size: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Differences in float32 are larger than most of these errors, and hide none of them."""
    compiled = cancelling()
    (rounding,) = comparison_of(compiled).differences.values()
    assert rounding > 1e-2
    plant(monkeypatch, size)
    assert any(line.startswith("output") for line in refused(compiled.merge, code="GC051").details)


def test_a_budget_that_is_given_is_one_for_the_models_own_dtype() -> None:
    assert refused(cancelling().merge, budget=1e-3, code="GC051").details
    assert refused(cancelling(fold={"budget": {"logits": 1e-3}}).merge, code="GC051").details


@pytest.mark.slow
def test_what_is_compiled_on_the_folded_base_is_compared_likewise() -> None:
    compiled = adapted("llama", lora(modules="lm_head", alpha=2), {"method": "pfeiffer"})
    cancel(compiled, "lm_head")
    partial = compiled.merge_partially()
    assert partial.folded == ("lora",) and partial.certificate.passed
    assert len(partial.certificate.notes) == 2 and partial.certificate.largest_difference < 1e-5
    assert refused(compiled.merge_partially, budget=1e-3, code="GC051").details


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "mixtral"])
def test_routes_are_imposed_in_float64_as_well(kind: str) -> None:
    """Float64 chooses other experts where scores are a rounding apart."""
    model = tiny(kind) if kind == "llama" else routed_model(FAMILIES[0], dtype=torch.float32)
    if kind != "llama":
        near_twins(model)
    comparison = comparison_of(adapted(model, lora(["attn.q", "attn.o"]), seed=0))
    worst = max(comparison.differences.values())
    differences, (note,) = comparison.within(worst / 4)
    assert differences.keys() == comparison.differences.keys() and f"{worst:.1e}" in note
    assert 0 < max(differences.values()) <= worst / 4


def test_no_second_comparison_where_the_first_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    comparison = comparison_of(cancelling())
    monkeypatch.setattr(Evaluation, "outputs_in_float64", lambda *_: pytest.fail("outputs keep to the budget"))
    assert comparison.within(1e9) == (comparison.differences, ())


@pytest.mark.parametrize("missing", [None, NotImplementedError("no kernel for Double")])
def test_a_model_that_cannot_be_run_in_float64_is_compared_in_its_own_dtype(
    missing: Exception | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def outputs(*_: Any) -> None:
        if missing is not None:
            raise missing

    monkeypatch.setattr(Evaluation, "outputs_in_float64", outputs)
    (line,) = refused(cancelling().merge, code="GC051").details
    assert line.startswith("output")


def test_a_model_that_draws_is_not_run_in_float64() -> None:
    class Draws(Cancels):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + torch.randn(x.shape[0], 6)

    torch.manual_seed(0)
    example = {"x": torch.randn(3, 6)}
    compiled = adapted(Draws().eval(), lora(modules="**.first"), inputs=example, cache=False)
    assert Evaluation(compiled._graftc, example).outputs_in_float64(Routes()) is None


class Returns(Cancels):
    """A model that also returns what a fold does not change, and numbers whose imaginary part alone it changes."""

    def forward(self, x: Tensor) -> Any:
        y = self.last(self.first(x))
        return (
            y,
            x * 1e9,
            (y * 1e6).to(torch.int64),
            torch.where(x > 0, y, -1e30),
            torch.complex(torch.zeros_like(y), y),
        )


def test_the_budget_follows_the_numbers_that_change() -> None:
    """Constants, whole numbers and other outputs' sizes allow no differences, and complex outputs are compared."""
    torch.manual_seed(0)
    compiled = adapted(Returns().eval(), lora(modules="**.first"), inputs={"x": torch.randn(64, 6)}, cache=False)
    perturb(compiled)
    certificate = compiled.merge().certificate
    assert certificate.passed and certificate.budget < 1e-3
    assert len(certificate.outputs) == 4 and all(0 < value < 1e-5 for value in list(certificate.outputs.values())[2:])
