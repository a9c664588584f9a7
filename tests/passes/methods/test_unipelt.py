"""UniPELT and MAM adapters: their contracts, and equality with their parts combined."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.compiled import Compiled
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import (
    FAMILIES,
    DeploymentContract,
    MethodContract,
    largest_difference,
    outputs_of,
)
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted

SMALL = {"length": 3, "reparameterization": {"hidden": 6, "width": 5}}
APL: dict[str, Any] = {"method": "unipelt", "prefix": SMALL, "adapter": {"reduction": 6}, "lora": {"rank": 3}}
AP: dict[str, Any] = {"method": "unipelt", "parts": ["adapter", "prefix"], "prefix": SMALL}
MAM: dict[str, Any] = {"method": "mam", "prefix": SMALL, "adapter": {"bottleneck": 7}}
PLAIN = {"length": 3, "reparameterization": None}


class TestAPL(MethodContract):
    """UniPELT with all parts, including an update of a map that is not square; all such maps of Mixtral are experts."""

    cacheable = False
    adaptation: ClassVar[dict[str, Any]] = {
        **APL,
        "target": {"role": ["ffn.sublayer", "attn", "attn.q", "attn.v", "ffn.up"]},
    }
    families = tuple(family for family in FAMILIES if family != "mixtral")


class TestAP(MethodContract):
    """UniPELT without low-rank updates, over real tokens, with dropout."""

    cacheable = False
    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**AP, "tokens": "real", "adapter": {"reduction": 6, "dropout": 0.1}}


class TestMAM(MethodContract):
    """MAM adapters: a prefix and parallel adapters."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = MAM


class TestDeployed(DeploymentContract):
    """Export and compilation of UniPELT."""

    adaptation: ClassVar[dict[str, Any]] = APL
    families = ("bert",)


def set_gates(compiled: Compiled, bias: float) -> None:
    """Set every gate to one value, whatever it reads."""
    tensors = compiled.adapter_state_dict()
    values = {"gate": 0.0, "gate_bias": bias}
    compiled.load_adapter_state_dict(
        {n: torch.full_like(t, values[p]) if (p := n.rpartition(".")[2]) in values else t for n, t in tensors.items()}
    )


def apart(family: str, compiled: Compiled, name: str, entries: list[dict[str, Any]]) -> Compiled:
    """Return a model with the parts as separate adaptations, with the tensors of the combined one."""
    other = graftc.compile({"adapt": entries}, tiny(family)).eval()
    tensors, renamed = compiled.adapter_state_dict(), {}
    for fqn in other.adapter_state_dict():
        before, _, rest = fqn.partition("graftc.")
        renamed[fqn] = tensors[f"{before}graftc.{name}.{rest.partition('.')[2]}"]
    other.load_adapter_state_dict(renamed)
    return other


APART = [
    {"method": "pfeiffer", "reduction": 6},
    {"method": "prefix", "length": 3},
    {"method": "lora", "rank": 3, "alpha": 3, "target": {"role": "attn.{q,v}"}},
]


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_open_gates_are_the_sum(family: str) -> None:
    """With gates at 1, the parts act like adaptations without gates."""
    compiled = adapted(family, {**APL, "prefix": PLAIN}, noise=0.2)
    set_gates(compiled, 60.0)
    inputs = inputs_for(compiled)
    other = apart(family, compiled, "unipelt", APART)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(other, inputs)) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize("family", FAMILIES)
def test_shut_gates_leave_a_prefix_of_zeros(family: str) -> None:
    """Adapters and updates vanish; a prefix becomes one of zeros, whose keys still take part in the softmax."""
    bare = {**APL, "parts": ["adapter", "lora"]}
    compiled = adapted(family, bare, noise=0.2)
    inputs = inputs_for(compiled)
    set_gates(compiled, -200.0)
    base = outputs_of(tiny(family), inputs)
    assert largest_difference(outputs_of(compiled, inputs), base) <= 1e-6
    compiled = adapted(family, {**APL, "prefix": PLAIN}, noise=0.2)
    set_gates(compiled, -200.0)
    zeros = graftc.compile({"adapt": [{"method": "prefix", "length": 3}]}, tiny(family)).eval()
    zeros.load_adapter_state_dict({n: torch.zeros_like(t) for n, t in zeros.adapter_state_dict().items()})
    actual = outputs_of(compiled, inputs)
    assert largest_difference(actual, outputs_of(zeros, inputs)) <= 1e-6
    assert largest_difference(actual, base) > 1e-4


@pytest.mark.full
def test_at_first() -> None:
    """Gates are near one half, with weights of standard deviation 0.02 and zero biases; updates are zero."""
    compiled = graftc.compile({"adapt": [APL]}, tiny("bert")).eval()
    tensors = compiled.adapter_state_dict()
    gates = {n: t for n, t in tensors.items() if n.endswith((".gate", ".gate_bias"))}
    assert len(gates) == 2 * 2 * 4
    assert all(t.shape == ((1, 48) if n.endswith("gate") else (1,)) for n, t in gates.items())
    assert all(not t.any() for n, t in gates.items() if n.endswith("bias"))
    spread = torch.cat([t.flatten() for n, t in gates.items() if n.endswith("gate")]).std()
    assert 0.017 < float(spread) < 0.023
    assert all(not t.any() for n, t in tensors.items() if n.endswith(".B"))
    without = graftc.compile({"adapt": [{**APL, "parts": ["adapter", "prefix"]}]}, tiny("bert")).eval()
    without.load_adapter_state_dict({n: tensors[n] for n in without.adapter_state_dict()})
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(without, inputs)) <= 1e-6


@pytest.mark.full
def test_padding() -> None:
    """A mean over all tokens depends on the length of the padding; a mean over real tokens does not."""
    ids = torch.randint(5, 50, (2, 6))
    longer = torch.nn.functional.pad(ids, (0, 4))

    def call(compiled: Compiled, tokens: Tensor) -> list[Tensor]:
        return outputs_of(compiled, {"input_ids": tokens, "attention_mask": (tokens > 0).long()})

    for tokens, moves in (("all", True), ("real", False)):
        compiled = adapted("bert", {**APL, "tokens": tokens}, noise=0.2)
        difference = largest_difference(call(compiled, ids), call(compiled, longer))
        assert (difference > 1e-5) if moves else (difference <= 1e-6)


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5"])
def test_mam_is_its_parts(family: str) -> None:
    """The prefix and the parallel adapter as separate adaptations give the same outputs."""
    compiled = adapted(family, {**MAM, "prefix": PLAIN}, noise=0.2)
    entries = [{"method": "prefix", "length": 3}, {"method": "he_parallel", "bottleneck": 7}]
    other, inputs = apart(family, compiled, "mam", entries), inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(other, inputs)) <= 2e-6


@pytest.mark.full
@pytest.mark.parametrize("entry", [APL, AP, MAM], ids=["APL", "AP", "MAM"])
def test_the_network_is_ejected(entry: dict[str, Any]) -> None:
    """The deployed model has only keys and values, its gates and adapters are unchanged, and so are its outputs."""
    compiled = adapted("bert", entry, noise=0.2)
    with pytest.raises(GraftError) as caught:
        compiled.merge()
    assert caught.value.code == "GC050"
    partial = compiled.merge_partially()
    deployed, inputs = partial.compiled.eval(), inputs_for(compiled)
    assert not {"vectors", "hidden", "keys_out"} & {n.rpartition(".")[2] for n in deployed.adapter_state_dict()}
    assert deployed.report.trainable_parameters == compiled.report.deployed_parameters
    assert largest_difference(outputs_of(deployed, inputs), outputs_of(compiled, inputs)) <= 2e-6


@pytest.mark.full
def test_targets() -> None:
    """Without roles every part has its default places, which layers narrow; places without a part are refused."""
    spec = graftc.load_spec({"adapt": [{**AP, "target": {"layers": 1}}]}).adapt[0]
    assert spec.target.role == ("ffn.sublayer", "attn") and spec.target.layers == 1
    compiled = graftc.compile({"adapt": [{**APL, "target": {"layers": 1}}]}, tiny("bert"))
    places = [str(site.key) for resolved in compiled.compilation.main.resolved for site, _ in resolved.places]
    assert len(places) == 4 and all("layer.1." in place for place in places)
    for target, message in (
        ({"role": ["attn", "ffn.sublayer", "attn.q"]}, "is for the part 'lora'"),
        ({"role": "attn"}, "has no place for the part 'adapter'"),
    ):
        with pytest.raises(GraftError, match=message) as caught:
            graftc.compile({"adapt": [{**AP, "target": target}]}, tiny("bert"))
        assert caught.value.code == "GC016"
        assert caught.value.place is not None and caught.value.place.path == "adapt[0].target"


@pytest.mark.slow
def test_what_a_spec_may_not_say() -> None:
    """Each case raises its code and names the place of the field."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({"method": "unipelt", "parts": []}, "parts"),
        ({"method": "unipelt", "parts": ["lora", "lora"]}, "parts[1]"),
        ({"method": "unipelt", "parts": ["lora", "ia3"]}, "parts[1]"),
        ({"method": "mam", "adapter": {"bottleneck": 4, "reduction": 2}}, "adapter.reduction"),
        ({"method": "unipelt", "prefix": {"length": 0}}, "prefix.length"),
    ]
    for entry, path in cases:
        with pytest.raises(GraftError) as caught:
            graftc.load_spec({"adapt": [entry]})
        assert caught.value.code == "GC002"
        assert caught.value.place is not None and caught.value.place.path == f"adapt[0].{path}"
    with pytest.raises(GraftError) as caught:
        graftc.compile({"adapt": [{**APL, "prefix": {"length": 10_000, "positions": "shifted"}}]}, tiny("bert"))
    assert caught.value.code == "GC020"
    assert caught.value.place is not None and caught.value.place.path == "adapt[0].prefix.length"
