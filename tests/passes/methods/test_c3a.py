"""C3A: the contract, its circulant blocks on every kind of site, its initial values, and its operator."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.passes.core.ops.circulants import circulant_product_decomposed, matrix_of
from graftc.runtime.model.runner import runner_of
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.dense_twins import dense_twin
from tests.kit.depth import each_way
from tests.kit.models import adapted, fresh
from tests.kit.specs import varied
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


class Mixed(nn.Module):
    """Convolutions, one of them with groups, a layer, and a product with a matrix on the left."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.grouped = nn.Conv2d(4, 8, 3, padding=1), nn.Conv1d(8, 12, 3, groups=2)
        self.point, self.left = nn.Linear(12, 20), nn.Linear(20, 8)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, 4, 5, 7]`` to ``[batch, 8, 33]``."""
        hidden = self.grouped(torch.tanh(self.wide(x)).flatten(2))
        outputs: Tensor = self.left.weight @ torch.tanh(self.point(torch.tanh(hidden).mT)).mT
        return outputs


MODULES = ["wide", "grouped", "point", "left"]


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_kind_of_site(size: int) -> None:
    """Each block has one row, moved by one from row to row, computed and folded alike."""
    torch.manual_seed(0)
    model, x = Mixed().double().requires_grad_(False), torch.randn(3, 4, 5, 7, dtype=torch.float64)
    entry = {"method": "c3a", "block_size": size, "target": {"modules": MODULES}}
    compiled = graftc.compile({"adapt": [entry]}, model, {"x": x}).eval()
    assert torch.equal(compiled(x), model(x))
    perturb(compiled, NOISE)
    tensors, folded = compiled.adapter_state_dict(), {n: t.clone() for n, t in model.state_dict().items()}
    for module in MODULES:
        weight = folded[f"{module}.weight"]
        kernel = tensors[f"{module}.graftc.c3a.kernel"]
        assert kernel.numel() == weight.numel() // size
        weight += update_of(kernel).reshape(weight.shape)
    by_hand = Mixed().double()
    by_hand.load_state_dict(folded)
    assert float((model(x) - by_hand(x)).detach().abs().max()) > 1e-1
    torch.testing.assert_close(compiled(x), by_hand(x), rtol=0, atol=1e-12)
    merged = compiled.merge()
    assert merged.certificate.passed
    torch.testing.assert_close(merged(x), by_hand(x), rtol=0, atol=1e-12)


@pytest.mark.slow
def test_update_may_have_full_rank() -> None:
    """Of a fused weight, only the rows of the site change, and one kernel for the whole of them reaches full rank."""
    compiled = fresh("gpt2", {**C3A, "target": {"role": "attn.v"}, "block_size": 48})
    (kernel,) = [t for name, t in perturb(compiled, NOISE).items() if ".h.1." in name]
    name = "transformer.h.1.attn.c_attn.weight"
    update = (lazy_tensors(compiled.compilation).exact(name) - compiled.compilation.store.get(name).double()).T
    assert kernel.shape == (1, 1, 48) and not update[:96].any()
    torch.testing.assert_close(update[96:], update_of(kernel), rtol=0, atol=1e-13)
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
    model = tiny("llama").eval()
    packed = graftc.compile({"adapt": [C3A], "base": {"quantize": "nf4"}}, model, seed=0).eval()
    dense = graftc.compile({"adapt": [C3A]}, dense_twin(model, quantize="nf4"), seed=0).eval()
    perturb(packed, NOISE)
    dense.load_adapter_state_dict(packed.adapter_state_dict())
    inputs = inputs_for(packed)
    assert same_bits(outputs_of(packed, inputs), outputs_of(dense, inputs))


@pytest.mark.full
def test_artifact_and_conversion(tmp_path: Path) -> None:
    """An artifact with C3A over LoRA gives the same bits; a conversion makes a LoRA of full rank."""
    compiled = adapted("gpt2", {"method": "lora", "rank": 3, "target": {"role": ROLES}}, C3A, noise=0.5)
    compiled.save(tmp_path / "kept")
    loaded = graftc.load(tmp_path / "kept", tiny("gpt2")).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
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
