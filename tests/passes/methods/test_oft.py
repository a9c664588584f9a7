"""OFT: the contract, rotations that keep angles, the sizes of blocks, the constraint, and published counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.folded_maps import DOWN, before_and_after, check_stack, loaded_again
from tests.passes.methods.places import OTHERS, ROLES

OFT: dict[str, Any] = {"method": "oft", "target": {"role": ROLES}, "block_size": 8}
EXACT = {**OFT, "cayley": "exact"}


class TestOFT(MethodContract):
    """OFT on the inputs of layers; ``attn.q`` and ``attn.v`` of GPT-2 are rows of one layer, with their own inputs."""

    adaptation: ClassVar[dict[str, Any]] = OFT
    families = ("gpt2",)
    perturbation = 0.1


@pytest.mark.full
class TestEverywhere(TestOFT):
    """OFT on the other families."""

    families = OTHERS


@pytest.mark.full
class TestExact(TestOFT):
    """The exact transform."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = EXACT
    families = ("gpt2", "llama", "t5")


@pytest.mark.full
class TestShared(TestOFT):
    """One rotation for all blocks of a site."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**OFT, "block_share": True}
    families = ("gpt2", "bert")


class TestExperts(MethodContract):
    """OFT with rotations for each expert, whose weights change instead of their inputs."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**OFT, "target": {"role": ["attn.v", "experts"]}}
    families = ("mixtral",)
    perturbation = 0.1


class TestDeployed(DeploymentContract):
    """Export and compilation of sums of powers."""

    adaptation: ClassVar[dict[str, Any]] = OFT
    families = ("gpt2",)
    perturbation = 0.1


@pytest.mark.full
class TestExactDeployed(DeploymentContract):
    """Export and compilation of one exact rotation for all blocks, which ONNX has no operator for."""

    adaptation: ClassVar[dict[str, Any]] = {**EXACT, "block_share": True}
    families = ("llama",)
    perturbation = 0.1


@pytest.mark.slow
def test_start_and_count() -> None:
    """Q is zero; each block has size (size - 1) / 2 entries, of one block if all share it."""
    compiled = fresh("bert", OFT)
    module = "bert.encoder.layer.0.output.dense.graftc.oft"
    tensor = compiled.adapter_state_dict()[f"{module}.Q"]
    assert tensor.shape == (10, 28) and not bool(tensor.any())
    assert compiled.report.trainable_parameters == 2 * 28 * (6 + 6 + 10)
    shared = graftc.check({"adapt": [{**OFT, "block_share": True}]}, tiny("bert"))
    assert shared.trainable_parameters == 2 * 28 * 3


def rotation(upper: Tensor, size: int, exact: bool) -> Tensor:
    """Return ``R``, computed entry by entry and by its definition."""
    blocks = []
    for row in upper.double():
        q = torch.zeros(size, size, dtype=torch.float64)
        q[tuple(torch.triu_indices(size, size, 1))] = row
        q = q - q.T
        one = torch.eye(size, dtype=torch.float64)
        powers = one + 2 * q + 2 * q @ q + 2 * q @ q @ q + q @ q @ q @ q
        blocks.append((one - q) @ torch.linalg.inv(one + q) if exact else powers)
    return torch.block_diag(*blocks)


@pytest.mark.full
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_update(family: str, exact: bool) -> None:
    """``W'`` is ``W R^T``; with the exact transform, products of rows keep their values."""
    compiled = fresh(family, EXACT if exact else OFT)
    tensors = perturb(compiled, 0.2)
    weight, folded = before_and_after(compiled, family)
    turn = rotation(tensors[f"{DOWN[family]}.graftc.oft.Q"], 8, exact)
    torch.testing.assert_close(folded, weight @ turn.T, rtol=0, atol=1e-13)
    apart = float((folded @ folded.T - weight @ weight.T).abs().max())
    assert apart <= 1e-12 if exact else apart > 1e-3


@pytest.mark.full
@pytest.mark.parametrize("terms", [2, 3, 4, 7])
def test_terms(terms: int) -> None:
    """All terms but the first and the last count twice; three terms are four."""
    compiled = fresh("llama", varied(OFT, terms=terms))
    tensor = next(iter(perturb(compiled, 0.2).values())).double()
    name = next(iter(compiled.compilation.parts["oft"].values()))["Q"].partition(".graftc")[0]
    weight = compiled.compilation.store.get(f"{name}.weight").double()
    q = torch.stack([rotation(row[None], 8, True) for row in tensor])
    q = torch.linalg.solve(torch.eye(8) + q, torch.eye(8) - q)  # the transform is its own inverse
    powers = [torch.linalg.matrix_power(q, n) for n in range(max(terms, 4) if terms > 2 else 2)]
    total = powers[0] + 2 * sum(powers[1:-1], start=torch.zeros(())) + (powers[-1] if terms > 2 else 2 * powers[1])
    folded = lazy_tensors(compiled.compilation).exact(f"{name}.weight")
    torch.testing.assert_close(folded, weight @ torch.block_diag(*total).T, rtol=0, atol=1e-13)


@pytest.mark.slow
def test_convolution() -> None:
    """In a convolution over patches of an image, the entries of a patch are rotated."""
    compiled = fresh("vit", varied(OFT, target={"modules": "**.patch_embeddings.projection"}))
    (tensor,) = perturb(compiled, 0.1).values()
    assert tensor.shape == (3 * 8 * 8 // 8, 28)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.slow
def test_sizes() -> None:
    """Blocks must divide the input, in number or in size, unless the nearest divisor is asked for."""
    with pytest.raises(GraftError, match="block_size 7 does not divide the 48 inputs") as error:
        fresh("bert", varied(OFT, block_size=7))
    assert error.value.code == "GC020" and error.value.hint is not None and "use 6 " in error.value.hint
    with pytest.raises(GraftError, match=r"blocks 48 does not fit .*, which has 48 inputs"):
        fresh("bert", {"method": "oft", "target": {"role": "attn.q"}, "blocks": 48})
    with pytest.raises(GraftError, match="not both"):
        fresh("bert", varied(OFT, blocks=4))
    with pytest.raises(GraftError, match="at least 2"):
        fresh("bert", varied(OFT, block_size=1))


@pytest.mark.full
@pytest.mark.parametrize(
    ("fields", "shapes"),
    [
        ({"block_size": 7}, {48: (8, 15), 80: (10, 28)}),
        ({"block_size": 100}, {48: (1, 48 * 47 // 2), 80: (1, 80 * 79 // 2)}),
        ({"blocks": 7}, {48: (6, 28), 80: (8, 45)}),
        ({"block_size": 32}, {48: (2, 276), 80: (2, 780)}),
    ],
)
def test_nearest(fields: dict[str, int], shapes: dict[int, tuple[int, int]]) -> None:
    """The nearest divisor of 48 or 80 is used, the smaller of two."""
    compiled = fresh("bert", {"method": "oft", "target": {"role": ["attn.q", "ffn.down"]}, "nearest": True, **fields})
    own = {48 if "query" in n else 80: tuple(t.shape) for n, t in compiled.adapter_state_dict().items()}
    assert own == shapes


@pytest.mark.slow
def test_constraint() -> None:
    """After a step, the norm of every block is at most eps / sqrt(blocks); before, larger values act as if it were."""
    eps = 0.5
    compiled = fresh("bert", varied(OFT, coft=True, eps=eps))
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    before = outputs_of(compiled, inputs)
    assert largest_difference(outputs_of(compiled.merge(), inputs), before) <= 1e-5
    parameters = [p for p in compiled.parameters() if p.requires_grad]
    largest = [float(p.detach().square().sum(-1).mul(2).sqrt().max()) * len(p) ** 0.5 for p in parameters]
    assert min(largest) > 2 * eps
    optimiser = torch.optim.SGD(parameters, lr=0.0)
    compiled.train()(**inputs)[0].square().sum().backward()
    optimiser.step()
    compiled.after_step()
    for parameter in parameters:
        norms = parameter.detach().square().sum(-1).mul(2).sqrt() * len(parameter) ** 0.5
        torch.testing.assert_close(norms, torch.full_like(norms, eps), rtol=1e-5, atol=0)
    compiled.eval()
    assert largest_difference(outputs_of(compiled, inputs), before) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5"])
def test_order_of_lora_and_oft(family: str) -> None:
    """LoRA and then OFT is ``(W + B A) R^T``, OFT and then LoRA ``W R^T + B A``; both fold to what they compute."""
    lora = {"method": "lora", "target": {"role": ROLES}, "rank": 4}
    results: list[Any] = []
    for entries in ((lora, OFT), (OFT, lora)):
        compiled = fresh(tiny(family), *entries)
        tensors = results[0][1] if results else perturb(compiled, 0.1)
        compiled.load_adapter_state_dict(tensors)
        inputs = inputs_for(compiled)
        outputs = outputs_of(compiled, inputs)
        assert largest_difference(outputs_of(compiled.merge(), inputs), outputs) <= 2e-5
        results.append((outputs, tensors))
    assert largest_difference(results[0][0], results[1][0]) > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_above_and_below_others(family: str) -> None:
    """OFT on experts rotates weights that other adaptations have changed, and DoRA takes the rotated ones."""
    dora = {"method": "dora", "rank": 2}
    check_stack(family, dora, {"method": "oft", "block_size": 4}, dora)


@pytest.mark.full
@pytest.mark.parametrize("entry", [OFT, {**EXACT, "block_share": True}])
def test_artifact(entry: dict[str, Any], tmp_path: Path) -> None:
    """An artifact gives the same outputs bit for bit."""
    compiled = fresh("bert", entry)
    perturb(compiled, 0.2)
    loaded_again(compiled, "bert", tmp_path / "kept")


@pytest.mark.full
@each_way
@pytest.mark.parametrize(
    ("described", "block_size", "millions"),
    [
        (("LlamaForCausalLM", "LlamaConfig", {}), 32, 17.65),
        (("BartForConditionalGeneration", "BartConfig", {}), 16, 2.03),
        (("BartForConditionalGeneration", "BartConfig", {}), 32, 4.19),
    ],
    ids=["llama-2-7b", "bart-large-16", "bart-large-32"],
)
def test_published_count(count: Any, described: Any, block_size: int, millions: float) -> None:
    """The counts of all linear layers in the paper's tables for Llama 2 7B and BART-large."""
    target = {"role": ["attn.{q,k,v,o}", "ffn.{gate,up,down}"]}
    if "Bart" in described[0]:
        target = {"modules": ["**.{q,k,v,out}_proj", "**.fc{1,2}"]}
    entry = {"method": "oft", "block_size": block_size, "target": target}
    assert count([entry], described).trainable_parameters / 1e6 == pytest.approx(millions, abs=0.005)
