"""LoHa: the contract, its formula, and the ranks that it reaches."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.folded_maps import DOWN, before_and_after
from tests.passes.methods.places import OTHERS, ROLES

LOHA = {"method": "loha", "target": {"role": ROLES}, "rank": 3, "alpha": 6}


class TestLoHa(MethodContract):
    """LoHa on layers; ``attn.q`` of GPT-2 is a range of rows."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "loha", "target": {"role": ROLES}, "rank": 4, "alpha": 6}
    families = ("gpt2",)
    perturbation = 0.2


@pytest.mark.full
class TestEverywhere(TestLoHa):
    """LoHa on the other families."""

    families = OTHERS


class TestExperts(MethodContract):
    """LoHa with factors for each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "loha", "target": {"role": ["attn.v", "experts"]}, "rank": 4}
    families = ("mixtral",)
    perturbation = 0.2


class TestDeployed(DeploymentContract):
    """Export and compilation of LoHa."""

    adaptation: ClassVar[dict[str, Any]] = TestLoHa.adaptation
    families = ("llama",)
    perturbation = 0.2


@pytest.mark.slow
def test_start_and_count() -> None:
    """A2 is zero, the other three are uniform within 1 / sqrt(columns); LoHa has twice the parameters of LoRA."""
    compiled = fresh("bert", LOHA)
    module = "bert.encoder.layer.0.output.dense.graftc.loha"
    tensors = {n.rpartition(".")[2]: t for n, t in compiled.adapter_state_dict().items() if n.startswith(f"{module}.")}
    assert {part: tuple(t.shape) for part, t in tensors.items()} == {
        **{"A1": (3, 80), "A2": (3, 80)},
        **{"B1": (48, 3), "B2": (48, 3)},
    }
    for part, tensor in tensors.items():
        largest, bound = float(tensor.abs().max()), tensor.shape[1] ** -0.5
        assert largest == 0 if part == "A2" else 0.9 * bound < largest <= bound
    assert compiled.report.trainable_parameters == 2 * 2 * 3 * (2 * (48 + 48) + 48 + 80)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_update(family: str) -> None:
    """``W' - W`` is ``s (B1 A1) * (B2 A2)``, of rank 9 at rank 3."""
    compiled = fresh(family, LOHA)
    tensors = {name: tensor.double() for name, tensor in perturb(compiled, 0.5).items()}
    before, after = before_and_after(compiled, family)
    update = after - before
    factors = {part: tensors[f"{DOWN[family]}.graftc.loha.{part}"] for part in ("A1", "B1", "A2", "B2")}
    expected = 6 / 3 * (factors["B1"] @ factors["A1"]) * (factors["B2"] @ factors["A2"])
    torch.testing.assert_close(update, expected, rtol=0, atol=1e-14)
    values = torch.linalg.svdvals(update)
    assert values[8] > 1e-3
    assert values[9] < 1e-12


@pytest.mark.full
def test_convolution() -> None:
    """In a convolution over patches of an image, a column is one entry of a patch."""
    compiled = fresh("vit", varied(LOHA, target={"modules": "**.patch_embeddings.projection"}))
    sizes = {name.rpartition(".")[2]: tuple(t.shape) for name, t in perturb(compiled, 0.3).items()}
    assert sizes["A1"] == (3, 3 * 8 * 8)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.full
def test_overrides_and_rank() -> None:
    """Rank and alpha may differ by site; a rank that exceeds a side is refused."""
    compiled = fresh("bert", varied(LOHA, overrides=[{"role": "ffn.down", "rank": 5}]))
    ranks = {n.split(".")[-4]: t.shape[0] for n, t in compiled.adapter_state_dict().items() if n.endswith("A1")}
    assert ranks == {"query": 3, "value": 3, "dense": 5}
    with pytest.raises(GraftError) as error:
        fresh("llama", varied(LOHA, rank=25))
    assert error.value.code == "GC020"
