"""LoKr: the contract, the split of sides, and the decomposition of factors."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.methods.lokr import split
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.places import OTHERS, ROLES

LOKR = {"method": "lokr", "target": {"role": "ffn.down"}, "rank": 2, "alpha": 3}


class TestLoKr(MethodContract):
    """LoKr on layers, with a decomposed and a full factor."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "lokr", "target": {"role": ROLES}, "rank": 2, "alpha": 3}
    families = ("gpt2",)
    perturbation = 0.2


class TestEverywhere(TestLoKr):
    """LoKr on the other families."""

    variant = True
    families = OTHERS


class TestExperts(MethodContract):
    """LoKr with factors for each expert, both of them decomposed."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "lokr",
        "target": {"role": ["attn.v", "experts"]},
        "rank": 2,
        "decompose_both": True,
    }
    families = ("mixtral",)
    perturbation = 0.3


class TestDeployed(DeploymentContract):
    """Export and compilation of LoKr."""

    adaptation: ClassVar[dict[str, Any]] = TestLoKr.adaptation
    families = ("gpt_neox",)
    perturbation = 0.2


def parts(compiled: Any) -> dict[str, tuple[int, ...]]:
    """The shapes of the first site's tensors, by part."""
    tensors = compiled.adapter_state_dict()
    module = next(iter(tensors)).rpartition(".")[0]
    return {n.rpartition(".")[2]: tuple(t.shape) for n, t in tensors.items() if n.startswith(f"{module}.")}


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [
        (256, -1, (16, 16)),
        (128, -1, (8, 16)),
        (127, -1, (1, 127)),
        (128, 4, (4, 32)),
        (128, 32, (32, 4)),
        (12, 5, (3, 4)),
        (14, 5, (2, 7)),
        (1, -1, (1, 1)),
    ],
)
def test_split(size: int, factor: int, expected: tuple[int, int]) -> None:
    """A side is split by the factor if that divides it, otherwise by the largest divisor up to it and the root."""
    assert split(size, factor) == expected


def test_split_is_that_of_peft() -> None:
    """The splits agree for every side up to 300 and factors around the usual ones."""
    layer = pytest.importorskip("peft.tuners.lokr.layer")
    for size in range(1, 301):
        for factor in (-1, 1, 2, 3, 4, 5, 7, 8, 12, 16, 20, 64):
            assert split(size, factor) == layer.factorization(size, factor), (size, factor)


@pytest.mark.full
@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"C": (6, 8), "DB": (8, 2), "DA": (2, 10)}),
        ({"rank": 5}, {"C": (6, 8), "D": (8, 10)}),
        ({"decompose_both": True}, {"CB": (6, 2), "CA": (2, 8), "DB": (8, 2), "DA": (2, 10)}),
        ({"factor": 4}, {"C": (4, 4), "DB": (12, 2), "DA": (2, 20)}),
        ({"factor": 4, "decompose_both": True}, {"C": (4, 4), "DB": (12, 2), "DA": (2, 20)}),
    ],
)
def test_tensors(fields: dict[str, Any], expected: dict[str, tuple[int, ...]]) -> None:
    """A factor is decomposed if the rank is under half of its larger side, C only if that is requested."""
    compiled = fresh("bert", varied(LOKR, **fields))
    assert parts(compiled) == expected
    zero = {name.rpartition(".")[2] for name, t in compiled.adapter_state_dict().items() if not t.any()}
    assert zero == {"CB" if "CB" in expected else "C"}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("both", [False, True])
def test_update(family: str, both: bool) -> None:
    """``W' - W`` is ``s kron(C, D)``."""
    compiled = fresh(family, varied(LOKR, decompose_both=both))
    tensors = {name: tensor.double() for name, tensor in perturb(compiled, 0.5).items()}
    lazy = lazy_tensors(compiled.compilation)
    name = next(iter(tensors)).partition(".graftc.")[0]
    update = lazy.exact(f"{name}.weight") - compiled.compilation.store.get(f"{name}.weight").double()
    factors = {part: tensors[f"{name}.graftc.lokr.{part}"] for part in parts(compiled)}
    small = factors["CB"] @ factors["CA"] if both else factors["C"]
    expected = 3 / 2 * torch.kron(small, factors["DB"] @ factors["DA"])
    torch.testing.assert_close(update.T if family == "gpt2" else update, expected, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_convolution() -> None:
    """In a convolution over patches, channels are split as in LyCORIS and PEFT; here three of them stay together."""
    compiled = fresh("vit", varied(LOKR, target={"modules": "**.patch_embeddings.projection"}))
    assert parts(compiled) == {"C": (6, 1), "DB": (8, 2), "DA": (2, 3 * 8 * 8)}
    perturb(compiled, 0.5)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.parametrize("factor", [0, -2])
def test_factor_is_checked(factor: int) -> None:
    """A factor has to be -1 or a number that could divide a side."""
    with pytest.raises(GraftError, match=rf"GC002.*factor must be .*, not {factor}"):
        fresh("bert", varied(LOKR, factor=factor))
