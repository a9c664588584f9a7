"""VeRA: the contract, the shared projections, and the trained vectors."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.places import OTHERS, ROLES

VERA = {"method": "vera", "target": {"role": ROLES}, "rank": 32}


class TestVeRA(MethodContract):
    """VeRA with one pair of projections for layers of several sizes, and a rank above the smaller ones."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "vera", "target": {"role": ROLES}, "rank": 64, "dropout": 0.1}
    families = ("gpt2",)


@pytest.mark.full
class TestEverywhere(TestVeRA):
    """VeRA on the other families."""

    families = OTHERS


class TestBesideExperts(MethodContract):
    """VeRA on the attentions of a mixture of experts."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "vera", "target": {"role": "attn.{q,k,v}"}, "rank": 64}
    families = ("mixtral",)


class TestDeployed(DeploymentContract):
    """Export and compilation of VeRA."""

    adaptation: ClassVar[dict[str, Any]] = TestVeRA.adaptation
    families = ("gpt2",)


@pytest.mark.slow
def test_tensors() -> None:
    """A and B exist once, frozen and as large as the largest site; d and b exist for each site."""
    compiled = fresh("llama", VERA)
    tensors = compiled.adapter_state_dict()
    shared = {name: tuple(t.shape) for name, t in tensors.items() if name.startswith("graftc.")}
    assert shared == {"graftc.vera.A": (32, 80), "graftc.vera.B": (48, 32)}
    trainable = {name: t for name, t in compiled.named_parameters() if t.requires_grad}
    assert set(trainable) == set(tensors) - set(shared)
    own = {name.split(".", 3)[3]: tuple(t.shape) for name, t in trainable.items() if ".layers.1." in name}
    assert own == {
        **{f"self_attn.{m}_proj.graftc.vera.d": (32,) for m in "qv"},
        **{"self_attn.q_proj.graftc.vera.b": (48,), "self_attn.v_proj.graftc.vera.b": (24,)},
        **{"mlp.down_proj.graftc.vera.d": (32,), "mlp.down_proj.graftc.vera.b": (48,)},
    }
    report = compiled.report
    assert report.trainable_parameters == 2 * (3 * 32 + 48 + 24 + 48)
    assert report.deployed_parameters == report.trainable_parameters + 32 * 80 + 48 * 32


@pytest.mark.slow
def test_start() -> None:
    """``d`` starts at 0.1, ``b`` at zero, and A and B uniform within Kaiming's bound, ``sqrt(6 / columns)``."""
    tensors = fresh("bert", varied(VERA, rank=256)).adapter_state_dict()
    for name, tensor in tensors.items():
        part = name.rpartition(".")[2]
        if part in "db":
            assert bool((tensor == (0.1 if part == "d" else 0)).all())
            continue
        bound = math.sqrt(6 / tensor.shape[1])
        assert 0.99 * bound < tensor.abs().max() <= bound
        assert abs(float(tensor.std()) - bound / math.sqrt(3)) < 0.02 * bound


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_update(family: str) -> None:
    """``W' - W`` is ``diag(b) B diag(d) A`` of the shared matrices' first rows and columns."""
    model = tiny(family)
    compiled = fresh(model, VERA)
    tensors = compiled.adapter_state_dict() | perturb(compiled, 0.3)
    lazy = lazy_tensors(compiled.compilation)
    name = {"bert": "bert.encoder.layer.1.output.dense", "gpt2": "transformer.h.1.mlp.c_proj"}.get(
        family, "model.layers.1.self_attn.v_proj"
    )
    update = lazy.exact(f"{name}.weight") - model.get_parameter(f"{name}.weight").detach().double()
    update = update.T if family == "gpt2" else update
    a, b = (tensors[f"graftc.vera.{part}"].double() for part in "AB")
    d, c = (tensors[f"{name}.graftc.vera.{part}"].double() for part in "db")
    rows, columns = update.shape
    torch.testing.assert_close(update, c.diag() @ b[:rows] @ d.diag() @ a[:, :columns], rtol=0, atol=1e-13)


@pytest.mark.full
def test_projection_seed() -> None:
    """`projection_seed` determines A and B, whatever the compilation's seed and the adaptation's name are."""
    entry = {"method": "vera", "target": {"role": ROLES}, "rank": 32}

    def projections(seed: int, **fields: Any) -> list[Tensor]:
        spec = {"adapt": [{**entry, **fields}]}
        tensors = graftc.compile(spec, tiny("bert"), seed=seed).adapter_state_dict()
        return [tensor for name, tensor in sorted(tensors.items()) if name.startswith("graftc.")]

    one = projections(0, projection_seed=5)
    assert same_bits(one, projections(1, projection_seed=5, name="other"))
    assert not same_bits(one, projections(0, projection_seed=6))
    assert not same_bits(projections(0), projections(1))
    assert not torch.equal(one[0].flatten()[:100], one[1].flatten()[:100])


@pytest.mark.full
def test_other_signatures_share_the_projections() -> None:
    """A second graph reads the same A and B."""
    compiled = fresh("bert", VERA)
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    other = {**inputs, "position_ids": torch.arange(9).expand(5, 9)}
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(compiled, other)) <= 1e-6
    assert len(compiled.compilation.signatures) == 2
    assert sum(name.startswith("graftc.") for name in compiled.adapter_state_dict()) == 2


@pytest.mark.full
def test_artifact(tmp_path: Path) -> None:
    """A and B are saved with the adapters."""
    compiled = fresh("bert", VERA)
    perturb(compiled, 0.3)
    compiled.save(tmp_path / "kept")
    loaded = graftc.load(tmp_path / "kept", tiny("bert"))
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))


@pytest.mark.slow
def test_no_gradient_at_zero() -> None:
    """An initial ``d`` of zero is refused, since neither vector would learn if both started at zero."""
    with pytest.raises(GraftError, match=r"GC002.*d_initial must not be 0"):
        fresh("bert", varied(VERA, d_initial=0.0))


@pytest.mark.full
@each_way
def test_published_count(count: Any) -> None:
    """RoBERTa-base with q and v at rank 1024: 24 (1024 + 768) = 43,008, which is 0.043M in the paper's table."""
    entry = {"method": "vera", "target": {"role": "attn.{q,v}"}, "rank": 1024}
    described = ("RobertaForSequenceClassification", "RobertaConfig", {})
    assert count([entry], described).trainable_parameters == 43_008
