"""BOFT: the contract, the butterfly, scaled outputs, sizes that fit, and published counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.folded_maps import DOWN, before_and_after, check_stack, loaded_again
from tests.passes.methods.places import OTHERS, ROLES

BOFT: dict[str, Any] = {"method": "boft", "target": {"role": ROLES}, "block_size": 4, "factors": 2}


class TestBOFT(MethodContract):
    """Two factors on layers with biases, which are not scaled; ``attn.q`` and ``attn.v`` of GPT-2 are rows of one."""

    adaptation: ClassVar[dict[str, Any]] = BOFT
    families = ("gpt2",)
    perturbation = 0.1


@pytest.mark.full
class TestEverywhere(TestBOFT):
    """BOFT on the other families."""

    families = OTHERS


@pytest.mark.full
class TestExperts(MethodContract):
    """BOFT with rotations and scales for each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**BOFT, "target": {"role": ["attn.v", "experts"]}}
    families = ("mixtral",)
    perturbation = 0.1


@pytest.mark.full
class TestDeployed(DeploymentContract):
    """Export and compilation of BOFT."""

    adaptation: ClassVar[dict[str, Any]] = BOFT
    families = ("gpt2",)
    perturbation = 0.1


@pytest.mark.slow
def test_start_and_count() -> None:
    """Q is zero and s is one."""
    compiled = fresh("bert", BOFT)
    module = "bert.encoder.layer.0.output.dense.graftc.boft"
    tensors = {n.rpartition(".")[2]: t for n, t in compiled.adapter_state_dict().items() if n.startswith(f"{module}.")}
    assert {part: tuple(t.shape) for part, t in tensors.items()} == {"Q": (2, 20, 4, 4), "s": (48,)}
    assert not bool(tensors["Q"].any()) and bool((tensors["s"] == 1).all())
    assert compiled.report.trainable_parameters == 2 * (2 * 4 * (48 + 48 + 80) + 3 * 48)


def butterfly(q: Tensor) -> Tensor:
    """Return ``R`` by its definition: rotations of blocks between permutations that put runs next to one another."""
    factors, blocks, size, _ = q.shape
    width, run = blocks * size, size // 2
    result = one = torch.eye(width, dtype=torch.float64)
    for number in range(factors):
        skew = (q[number].double() - q[number].double().mT) / 2
        eye = torch.eye(size, dtype=torch.float64)
        turn = torch.block_diag(*((eye - s) @ torch.linalg.inv(eye + s) for s in skew))
        apart = 2**number
        starts = [
            group + offset + other
            for group in range(0, width, apart * size)
            for offset in range(0, apart * run, run)
            for other in (0, apart * run)
        ]
        # Row k of the permutation has its one where entry k of the sorted order comes from.
        order = [start + entry for start in starts for entry in range(run)] if number else list(range(width))
        place = torch.zeros_like(one)
        for new, old in enumerate(order):
            # The halves of block (group, offset) are sorted next to each other.
            place[old, new] = 1
        result = place @ turn @ place.T @ result
    return result


@pytest.mark.full
@pytest.mark.parametrize("factors", [1, 2, 3, 4])
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_update(family: str, factors: int) -> None:
    """``W'`` is ``diag(s) W R^T``, and ``R`` is a rotation under which ever more entries depend on one another."""
    size = 2 if factors > 3 else 4
    compiled = fresh(family, varied(BOFT, factors=factors, block_size=size, target={"role": "ffn.down"}))
    tensors = perturb(compiled, 0.2)
    weight, folded = before_and_after(compiled, family)
    name = DOWN[family]
    scale = tensors[f"{name}.graftc.boft.s"].double()[:, None]
    turn = butterfly(tensors[f"{name}.graftc.boft.Q"])
    torch.testing.assert_close(folded, scale * (weight @ turn.T), rtol=0, atol=1e-13)
    torch.testing.assert_close(turn @ turn.T, torch.eye(80, dtype=torch.float64), rtol=0, atol=1e-13)
    assert int((turn != 0).sum(0).max()) == size * 2 ** (factors - 1)


@pytest.mark.slow
def test_biases_are_not_scaled() -> None:
    """A scale of zero leaves the bias."""
    model = tiny("bert")
    compiled = fresh(model, varied(BOFT, target={"modules": "**.0.output.dense"}))
    (name,) = {n.rpartition(".graftc")[0] for n in compiled.adapter_state_dict()}
    state = {n: torch.zeros_like(t) if n.endswith(".s") else t for n, t in compiled.adapter_state_dict().items()}
    compiled.load_adapter_state_dict(state)
    inputs = inputs_for(compiled)
    expected = model.get_submodule(name).bias
    model.get_submodule(name).register_forward_hook(lambda module, given, output: expected.expand_as(output))
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) <= 1e-6


@pytest.mark.slow
def test_convolution() -> None:
    """In a convolution over patches of an image, the entries of a patch are rotated, and channels are scaled."""
    compiled = fresh("vit", varied(BOFT, target={"modules": "**.patch_embeddings.projection"}, factors=3))
    shapes = {name.rpartition(".")[2]: tuple(t.shape) for name, t in perturb(compiled, 0.1).items()}
    assert shapes == {"Q": (3, 48, 4, 4), "s": (48,)}
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.slow
def test_sizes() -> None:
    """Blocks must divide the input, and with several factors in pairs of halves."""
    for fields, words in (
        ({"block_size": 5}, "block_size 5 does not divide the 48 inputs"),
        ({"block_size": 3}, "block_size 3 does not fit"),
        ({"block_size": 4, "factors": 4}, "block_size 4 does not fit"),
    ):
        with pytest.raises(GraftError, match=words) as error:
            fresh("bert", varied(BOFT, **fields))
        assert error.value.code == "GC020"
    assert fresh("bert", varied(BOFT, block_size=3, factors=1, target={"role": "attn.q"})).report.trainable_parameters


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "mixtral", "bert"])
def test_above_and_below_others(family: str) -> None:
    """BOFT rotates and scales weights that others have changed, below a vector that also scales the bias."""
    others: list[dict[str, Any]] = [{"method": "lora", "rank": 2}, {"method": "boft", "factors": 2}]
    others.append({"method": "dora", "rank": 2})
    if family != "mixtral":
        others.insert(0, {"method": "ia3", "side": "output"})
    check_stack(family, *others)


@pytest.mark.full
def test_artifact(tmp_path: Path) -> None:
    """An artifact gives the same outputs bit for bit."""
    compiled = fresh("bert", BOFT)
    perturb(compiled, 0.2)
    loaded_again(compiled, "bert", tmp_path / "kept")


@pytest.mark.full
@each_way
def test_published_count(count: Any) -> None:
    """The paper's 0.75M for DeBERTaV3-base with two factors of blocks of 8 counts the free entries of Q, s and the
    adapted layers' biases; it is 746,496. Of Q, 7 / 16 of the entries are free.
    """
    target = {"role": ["attn.{q,k,v,o}", "ffn.{up,down}"]}
    entry = {"method": "boft", "block_size": 8, "factors": 2, "target": target}
    outputs = 12 * (5 * 768 + 3072)
    trained = count([entry], ("BertForSequenceClassification", "BertConfig", {})).trainable_parameters
    assert (trained - outputs) * 7 / 16 + 2 * outputs == 746_496
