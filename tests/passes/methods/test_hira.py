"""HiRA: the contract, its formula on top of other adaptations and on every kind of site, and its initial values."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import adapted, fresh
from tests.kit.specs import varied
from tests.passes.methods.folded_maps import check_by_hand, check_packed_base, loaded_again
from tests.passes.methods.places import OTHERS, ROLES

HIRA = {"method": "hira", "target": {"role": ROLES}, "rank": 3}


class TestHiRA(MethodContract):
    """HiRA on layers; ``attn.q`` of GPT-2 is a range of rows."""

    adaptation: ClassVar[dict[str, Any]] = {**HIRA, "rank": 4, "dropout": 0.1}
    families = ("gpt2",)
    perturbation = 0.3


@pytest.mark.full
class TestEverywhere(TestHiRA):
    """HiRA on the other families."""

    families = OTHERS


@pytest.mark.full
class TestExperts(MethodContract):
    """HiRA with factors for each expert."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**HIRA, "target": {"role": ["attn.v", "experts"]}}
    families = ("mixtral",)
    perturbation = 0.3


@pytest.mark.full
class TestTable(MethodContract):
    """HiRA on an embedding table, which multiplies what it looks up."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**HIRA, "target": {"role": ["embed", "attn.q"]}}
    families = ("bert",)
    perturbation = 0.3


@pytest.mark.full
class TestRandomStart(MethodContract):
    """HiRA that starts with another function than the base's."""

    variant = True
    starts_elsewhere = True
    adaptation: ClassVar[dict[str, Any]] = {**HIRA, "init": "random"}
    families = ("llama",)


class TestDeployed(DeploymentContract):
    """Export and compilation of HiRA."""

    adaptation: ClassVar[dict[str, Any]] = TestHiRA.adaptation
    families = ("llama",)
    perturbation = 0.3


class Mixed(nn.Module):
    """A table, a convolution, one with groups, and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(11, 6)
        self.wide, self.grouped = nn.Conv2d(6, 8, 3, padding=1), nn.Conv2d(8, 12, 3, groups=4)
        self.point = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Map integers ``[batch, 5, 7]`` to ``[batch, 3, 5, 5]``."""
        hidden = self.grouped(torch.tanh(self.wide(self.table(x).movedim(-1, 1))))
        outputs: Tensor = self.point(torch.tanh(hidden).movedim(1, -1))
        return outputs


EVERYWHERE = {"modules": ["table", "wide", "grouped", "point"]}


def mixed(**fields: Any) -> tuple[Any, nn.Module, Tensor]:
    """Return `Mixed` in float64 with HiRA everywhere, in eval mode, its source and its input."""
    torch.manual_seed(0)
    model, x = Mixed().double().requires_grad_(False), torch.randint(0, 11, (3, 5, 7))
    entry = {"method": "hira", "rank": 2, "target": EVERYWHERE, **fields}
    return graftc.compile({"adapt": [entry]}, model, {"x": x}).eval(), model, x


@pytest.mark.slow
def test_every_kind_of_site() -> None:
    """``W' = W + W * (B A)`` at tables, convolutions and layers, within groups as well, computed and folded alike."""
    compiled, model, x = mixed()
    assert torch.equal(compiled(x), model(x))
    tensors = perturb(compiled, 0.5)
    folded = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for module in EVERYWHERE["modules"]:
        a, b = (tensors[f"{module}.graftc.hira.{part}"].double() for part in "AB")
        product = b @ a
        weight = folded[f"{module}.weight"]
        weight += weight * (product.T if module == "table" else product.reshape(weight.shape))
    check_by_hand(compiled, model, Mixed(), folded, x, least=1e-2, atol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("init", ["kaiming", "gaussian", "random"])
def test_start(init: str) -> None:
    """The zero factor is B, but A in a table; a convolution starts uniform unless ``init`` is random."""
    compiled, *_ = mixed(rank=5, init=init, excess_rank=True)
    tensors = dict(compiled.named_parameters())
    for module in EVERYWHERE["modules"]:
        a, b = (tensors[f"{module}.graftc.hira.{part}"] for part in "AB")
        zero, drawn = (a, b) if module == "table" else (b, a)
        assert bool(zero.any()) == (init == "random")
        uniform = init == "kaiming" if module == "point" else init != "random" and module != "table"
        largest, bound = float(drawn.detach().abs().max()), drawn.shape[1] ** -0.5
        assert 0.9 * bound < largest <= bound if uniform else largest > drawn.shape[1] ** -0.5 / 2
        if module == "point" and init == "gaussian":
            assert float(drawn.detach().std()) == pytest.approx(1 / 5, rel=0.3)
        if init == "random":
            assert float(torch.cat([a.flatten(), b.flatten()]).detach().std()) == pytest.approx(1, abs=0.25)


@pytest.mark.full
def test_count_is_that_of_lora() -> None:
    hira, lora = (fresh("bert", varied(HIRA, method=method)).report for method in ("hira", "lora"))
    assert hira.trainable_parameters == lora.trainable_parameters == 2 * 3 * (2 * (48 + 48) + 48 + 80)


BELOW: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora", "rank": 3, "target": {"role": ROLES}},
    "ia3": {"method": "ia3"},
    "dora": {"method": "dora", "rank": 3, "target": {"role": ROLES}},
    "hira": {**HIRA, "name": "below"},
    "lokr": {"method": "lokr", "rank": 2, "target": {"role": ROLES}},
}


@pytest.mark.full
@pytest.mark.parametrize("below", BELOW)
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_on_top_of_another_adaptation(family: str, below: str) -> None:
    """The weight that the branch multiplies is the one after the adaptation below, and both fold exactly, in order."""
    model = tiny(family).double()
    compiled = graftc.compile({"adapt": [BELOW[below], {**HIRA, "name": "top"}]}, model).eval()
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) <= 1e-14
    perturb(compiled, 0.3)
    alone = graftc.compile({"adapt": [BELOW[below]]}, model).eval()
    own = {name: t for name, t in compiled.adapter_state_dict().items() if ".top." not in name}
    alone.load_adapter_state_dict(own)
    name = {"gpt2": "transformer.h.1.mlp.c_proj", "llama": "model.layers.1.mlp.down_proj"}[family]
    first, both = (lazy_tensors(each.compilation).exact(f"{name}.weight") for each in (alone, compiled))
    a, b = (compiled.adapter_state_dict()[f"{name}.graftc.top.{part}"].double() for part in "AB")
    product = (b @ a).T if family == "gpt2" else b @ a
    torch.testing.assert_close(both, first + first * product, rtol=0, atol=1e-13)
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 1e-11


@pytest.mark.full
def test_below_another_adaptation() -> None:
    """DoRA on top uses the norms of the weight that HiRA has multiplied."""
    compiled = adapted("llama", HIRA, {"method": "dora", "rank": 3, "target": {"role": ROLES}}, noise=0.2)
    merged, inputs = compiled.merge(), inputs_for(compiled)
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 2e-5


@pytest.mark.full
def test_a_quantised_base() -> None:
    """The branch multiplies the values that the packed weight stands for."""
    check_packed_base(HIRA, 0.3)


@pytest.mark.full
def test_artifact(tmp_path: Path) -> None:
    """An artifact with HiRA over LoRA gives the same bits."""
    compiled = adapted("gpt2", BELOW["lora"], HIRA)
    loaded_again(compiled, "gpt2", tmp_path / "kept")


@pytest.mark.full
def test_overrides_and_rank() -> None:
    """Rank and initialiser may differ by site; a rank that exceeds a side is refused."""
    compiled = fresh("bert", varied(HIRA, overrides=[{"role": "ffn.down", "rank": 5, "init": "random"}]))
    tensors = compiled.adapter_state_dict()
    ranks = {n.split(".")[-4]: t.shape[0] for n, t in tensors.items() if n.endswith(".A")}
    assert ranks == {"query": 3, "value": 3, "dense": 5}
    assert {n.split(".")[-4] for n, t in tensors.items() if n.endswith(".B") and t.any()} == {"dense"}
    with pytest.raises(GraftError) as error:
        fresh("llama", varied(HIRA, rank=25))
    assert error.value.code == "GC020"


@pytest.mark.full
@each_way
def test_published_counts(count: Any) -> None:
    """The paper's rank of 32 at q, k, v, up and down is 0.83 % of Llama 2 7B and 0.70 % of Llama 3 8B."""
    entry = {"method": "hira", "target": {"role": ["attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down"]}}
    grouped = {"num_key_value_heads": 8, "intermediate_size": 14336, "vocab_size": 128256}
    for values, expected, percent in (({}, 56_098_816, 0.83), (grouped, 56_623_104, 0.70)):
        described = ("LlamaForCausalLM", "LlamaConfig", values)
        counts = count([entry], described)
        assert counts.trainable_parameters == expected
        assert round(counts.percent, 2) == percent
