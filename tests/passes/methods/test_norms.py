"""Tuning of normalisations: the contract, the trained tensors, and counts."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import FAMILIES, DeploymentContract, MethodContract, perturb
from graftc.testing.families import tiny


class TestNorms(MethodContract):
    """Tuning of layer norms with shifts."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "norms"}
    families = ("bert",)


class TestEverywhere(TestNorms):
    """Tuning of layer norms and RMS norms of the other families."""

    variant = True
    families = tuple(family for family in FAMILIES if family != "bert")


class TestDeployed(DeploymentContract):
    """Export and compilation, with and without shifts."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "norms"}
    families = ("bert", "llama")


def owners(compiled: Any) -> set[str]:
    """The base tensors whose copies train."""
    trained = (name for name, tensor in compiled.named_parameters() if tensor.requires_grad)
    return {name.replace(".graftc.norms", "") for name in trained}


NORMS = ("norm", "ln_")
"""Parts of the names of norm modules in these families."""


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "llama", "t5", "vit"])
def test_exactly_the_norms_train(family: str) -> None:
    """Only scales and shifts of all norms train, and merging changes only these tensors, to the trained values."""
    model = tiny(family)
    compiled = graftc.compile({"adapt": [{"method": "norms"}]}, model)
    named = {name for name, _ in model.named_parameters() if any(n in name.lower().split(".")[-2] for n in NORMS)}
    assert owners(compiled) == named
    trained = perturb(compiled)
    merged = compiled.merge().to_transformers()
    changed = {name for name, p in merged.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert changed == named
    for name in named:
        module, _, part = name.rpartition(".")
        assert torch.equal(merged.get_parameter(name), trained[f"{module}.graftc.norms.{part}"])


@pytest.mark.full
def test_a_scale_with_one_added() -> None:
    """Gemma multiplies by ``1 + w``, and ``w`` trains."""
    from transformers import GemmaConfig, GemmaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2, "vocab_size": 101, "head_dim": 12}
    model = GemmaForCausalLM(GemmaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)).eval()
    compiled = graftc.compile({"adapt": [{"method": "norms"}]}, model)
    assert owners(compiled) == {name for name, _ in model.named_parameters() if "norm" in name}
    perturb(compiled)
    assert compiled.merge().certificate.passed


@pytest.mark.slow
def test_narrowing() -> None:
    """The ``target`` in a spec narrows the default one."""
    model = tiny("bert")
    entry = {"method": "norms", "target": {"layers": -1, "exclude": "**.attention.**"}}
    compiled = graftc.compile({"adapt": [entry]}, model)
    assert owners(compiled) == {f"bert.encoder.layer.1.output.LayerNorm.{part}" for part in ("weight", "bias")}


def test_two_owners() -> None:
    """A norm trains in one adaptation only."""
    entries = [{"method": "norms"}, {"method": "norms", "name": "again", "target": {"layers": 0}}]
    with pytest.raises(GraftError) as error:
        graftc.compile({"adapt": entries}, tiny("llama"))
    assert error.value.code == "GC021"


@pytest.mark.slow
def test_other_sites_are_refused() -> None:
    """A linear map is not a normalisation."""
    with pytest.raises(GraftError) as error:
        graftc.compile({"adapt": [{"method": "norms", "target": {"role": "attn.q"}}]}, tiny("llama"))
    assert error.value.code == "GC016"


@pytest.mark.full
@pytest.mark.parametrize(("family", "count"), [("bert", 5 * 2 * 48), ("llama", 5 * 48)])
def test_count(family: str, count: int) -> None:
    """The norms of all layers count, and those outside of layers; RMS norms have no shift."""
    report = graftc.check({"adapt": [{"method": "norms"}]}, tiny(family).to("meta"))
    assert report.trainable_parameters == report.deployed_parameters == count
