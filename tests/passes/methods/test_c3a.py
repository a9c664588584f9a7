"""C3A: the contract, its circulant blocks on every kind of site, its initial values, and its operator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from graftc.passes.core.ops.circulants import circulant_product_decomposed, matrix_of
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import adapted, fresh
from tests.kit.specs import varied
from tests.passes.methods.folded_maps import (
    check_every_kind_of_map,
    check_packed_base,
    loaded_again,
    update_of_values,
)
from tests.passes.methods.places import OTHERS, ROLES

C3A = {"method": "c3a", "target": {"role": ROLES}, "block_size": 4}
NOISE = 4.0
"""The update is divided by the number of columns."""


class TestC3A(MethodContract):
    """C3A on layers; ``attn.q`` of GPT-2 is a range of rows."""

    adaptation: ClassVar[dict[str, Any]] = {**C3A, "block_size": 8}
    families = ("gpt2",)
    perturbation = NOISE


@pytest.mark.full
class TestEverywhere(TestC3A):
    """C3A on the other families."""

    families = OTHERS


@pytest.mark.full
class TestExperts(MethodContract):
    """C3A with kernels for each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**C3A, "target": {"role": ["attn.v", "experts"]}}
    families = ("mixtral",)
    perturbation = NOISE


@pytest.mark.full
class TestXavier(MethodContract):
    """C3A with the start of the paper, from which it computes another function than the base."""

    variant = True
    starts_elsewhere = True
    adaptation: ClassVar[dict[str, Any]] = {**C3A, "init": "xavier"}
    families = ("llama",)
    perturbation = NOISE


class TestDeployed(DeploymentContract):
    """Export and compilation of C3A."""

    adaptation: ClassVar[dict[str, Any]] = TestC3A.adaptation
    families = ("llama",)
    perturbation = NOISE


def update_of(kernel: Tensor) -> Tensor:
    """Return the update of a weight, entry by entry."""
    m, n, size = kernel.shape
    update = torch.zeros(m * size, n * size, dtype=torch.float64)
    for row in range(m * size):
        for column in range(n * size):
            (i, t), (j, c) = divmod(row, size), divmod(column, size)
            update[row, column] = kernel[i, j, (c - t) % size].double()
    return update / (n * size)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_kind_of_site(size: int) -> None:
    """Each block has one row, moved by one from row to row, computed and folded alike."""

    def update(tensors: dict[str, Tensor], spec: Any) -> Tensor:
        result = update_of(tensors["kernel"])
        assert tensors["kernel"].numel() == result.numel() // size
        return result

    check_every_kind_of_map({"method": "c3a", "block_size": size}, update, noise=NOISE, atol=1e-12)


@pytest.mark.slow
def test_update_may_have_full_rank() -> None:
    """Of a fused weight, only the rows of the site change, and one kernel for the whole of them reaches full rank."""
    compiled = fresh("gpt2", {**C3A, "target": {"role": "attn.v"}, "block_size": 48})
    (kernel,) = [t for name, t in perturb(compiled, NOISE).items() if ".h.1." in name]
    update = update_of_values(compiled)
    assert kernel.shape == (1, 1, 48)
    torch.testing.assert_close(update, update_of(kernel), rtol=0, atol=1e-13)
    assert torch.linalg.svdvals(update)[47] > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("init", "bound"), [("zeros", 0), ("xavier", (6 / 128) ** 0.5), ("kaiming", 80**-0.5)])
def test_start(init: str, bound: float) -> None:
    """Bounds are those of the whole map, of 48 rows and 80 columns."""
    compiled = fresh(tiny("bert", layers=1), varied(C3A, init=init, target={"role": "ffn.down"}))
    (kernel,) = compiled.adapter_state_dict().values()
    assert kernel.shape == (12, 20, 4) and 0.99 * bound <= float(kernel.abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 1, 8), (2, 3, 5), (4, 2, 1)], ids=str)
def test_the_operator_is_a_product_with_the_matrix(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    """Fourier transforms give the products and gradients of the matrix, for even and odd sizes of blocks."""
    generator = torch.Generator().manual_seed(0)
    kernel, x, grad = (
        torch.randn(*sizes, dtype=torch.float64, generator=generator).to(dtype)
        for sizes in (shape, (2, 7, shape[1] * shape[2]), (2, 7, shape[0] * shape[2]))
    )
    results = []
    for function, wide in ((torch.ops.graftc.circulant_product, dtype), (circulant_product_decomposed, torch.float64)):
        own, values = (tensor.detach().to(wide).requires_grad_() for tensor in (kernel, x))
        product = function(values, own)
        product.backward(grad.to(wide))
        assert product.dtype == wide
        results.append((product, values.grad, own.grad))
    tolerance = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2}[dtype]
    for one, other in zip(*results, strict=True):
        scale = float(other.detach().abs().max())
        torch.testing.assert_close(one.double(), other, rtol=0, atol=tolerance * scale)
    matrix = matrix_of(kernel)
    assert torch.equal(matrix[0, : shape[2]], kernel[0, 0])
    assert torch.equal(matrix[1 : shape[2], 0], kernel[0, 0].flip(0)[: shape[2] - 1])


def test_the_operator_meets_what_torch_asks() -> None:
    """Its fake kernel and its gradient have the right shapes, strides and dtypes."""
    x, kernel = torch.randn(2, 3, 8, dtype=torch.float64), torch.randn(3, 2, 4, dtype=torch.float64)
    for given in ((x, kernel), (x.mT.contiguous().mT, kernel)):
        inputs = tuple(tensor.detach().requires_grad_() for tensor in given)
        torch.library.opcheck(torch.ops.graftc.circulant_product.default, inputs)


@pytest.mark.full
def test_a_quantised_base() -> None:
    """On packed weights, outputs are those over the values that the weights stand for."""
    check_packed_base(C3A, NOISE)


@pytest.mark.full
def test_artifact_and_conversion(tmp_path: Path) -> None:
    """An artifact with C3A over LoRA gives the same bits; a conversion makes a LoRA of full rank."""
    compiled = adapted("gpt2", {"method": "lora", "rank": 3, "target": {"role": ROLES}}, C3A, noise=0.5)
    loaded, inputs = loaded_again(compiled, "gpt2", tmp_path / "kept"), inputs_for(compiled)
    assert largest_difference(outputs_of(loaded.merge(), inputs), outputs_of(compiled, inputs)) <= 5e-5
    converted = runner_of(compiled).convert(["c3a"])
    assert converted.largest_error < 1e-6 and {site.rank for site in converted.sites} == {48}


@pytest.mark.slow
def test_overrides_and_sizes() -> None:
    """Block sizes and initial values may differ by site; a size that does not divide both sides is refused."""
    compiled = fresh("bert", varied(C3A, overrides=[{"role": "ffn.down", "block_size": 16, "init": "xavier"}]))
    kernels = {n.split(".")[-4]: t for n, t in compiled.adapter_state_dict().items()}
    assert {name: t.shape[-1] for name, t in kernels.items()} == {"query": 4, "value": 4, "dense": 16}
    assert {name for name, t in kernels.items() if t.any()} == {"dense"}
    with pytest.raises(GraftError) as error:
        fresh(tiny("llama", layers=1), varied(C3A, block_size=32, target={"role": "ffn.down"}))
    assert error.value.code == "GC002" and error.value.place is not None
    says = r"block_size: 32 does not divide both sides of .* 48 x 80.*use a divisor of 16"
    assert re.search(says, str(error.value), re.DOTALL)


@pytest.mark.full
@each_way
def test_published_counts(count: Any) -> None:
    """RoBERTa-base with q and v: 0.018M with blocks of 768, 0.111M with blocks of 128, as in the paper's table."""
    described = ("RobertaForSequenceClassification", "RobertaConfig", {})
    for size, expected in ((768, 18_432), (128, 110_592)):
        entry = {"method": "c3a", "target": {"role": "attn.{q,v}"}, "block_size": size}
        assert count([entry], described).trainable_parameters == expected
