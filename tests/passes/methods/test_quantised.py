"""Every method on a quantised base equals, to the bit, the same method on a plain model with the quantised values."""

from __future__ import annotations

import unittest
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.packing.packed_tensor import PackedTensor, dense
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import families, perturb
from graftc.testing.compare import inputs_for
from tests.kit.dense_twins import dense_twin

MAPS = {"role": ["attn.q", "ffn.down"]}
EXPERTS = {"role": ["attn.q", "experts"]}
LINEAR = ("spiel", "spiel-ag", "vera", "lily")
"""Methods that do not support experts."""

FORMATS = ("int8", "int4", "nf4", "fp4")
FAMILIES = ("bert", "gpt2", "llama", "mixtral", "t5")
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"target": MAPS, "rank": 4} for name in ("lora", "dora", "adalora")},
    "loftq": {"method": "lora", "target": MAPS, "rank": 4, "init": "loftq"},
    "pissa": {"method": "lora", "target": MAPS, "rank": 4, "init": "pissa"},
    **{name: {} for name in ("houlsby", "ia3", "prefix", "prompt", "unipelt")},
    "spiel": {"density": 0.02, "target": MAPS},
    "spiel-ag": {"method": "spiel", "variant": "AG", "density": 0.02, "target": MAPS},
    **{name: {"target": MAPS} for name in ("sora", "dylora", "vera", "loha", "lokr", "adamix_lora")},
    "oft": {"target": MAPS, "block_size": 8},
    "boft": {"target": MAPS, "factors": 2},
    "miss": {"target": MAPS, "rank": 7},
    "miss-bat": {"method": "miss", "target": MAPS, "rank": 8, "variant": "bat"},
    "shira": {"target": MAPS, "rank": 3},
    "lily": {"target": MAPS, "rank": 4, "stride_a": 2},
    "hira": {"target": MAPS, "rank": 4},
    "c3a": {"target": MAPS, "block_size": 4},
    "gralora": {"target": MAPS, "rank": 4, "hybrid_rank": 3},
    **{name: {"target": MAPS} for name in ("child_tuning", "lt_sft", "mask", "pruning", "diff_pruning", "full")},
}


def spec_of(name: str, family: str, **base: Any) -> dict[str, Any]:
    """A spec for a method of `METHODS`, on a base that is quantised if ``base`` says so."""
    adaptation = {"method": name, **METHODS[name]}
    if family == "mixtral" and adaptation.get("target") == MAPS:
        adaptation["target"] = {"role": "attn.q"} if name in LINEAR else EXPERTS
    return {"adapt": [adaptation], **({"base": base} if base else {})}


def trained(spec: dict[str, Any], model: nn.Module, family: str) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the outputs after two steps, and all trained tensors."""
    compiled = graftc.compile(graftc.Spec.model_validate(spec), model, seed=0).train()
    inputs = inputs_for(compiled, seed=3)
    parameters = [p for p in compiled.parameters() if p.requires_grad]
    optimiser = torch.optim.SGD(parameters, lr=0.05)
    for seed in range(2):
        torch.manual_seed(seed)
        compiled(**inputs)[0].square().mean().backward()
        optimiser.step()
        optimiser.zero_grad()
    compiled.eval()
    with torch.no_grad():
        output = compiled(**inputs)[0]
    return output, {name: p.detach() for name, p in compiled.named_parameters() if p.requires_grad}


@pytest.mark.full
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", [name for name in METHODS if name != "loftq"])
def test_equals_the_dense_twin(name: str, family: str, kind: str) -> None:
    """Training and outputs equal those of the same method on the values, which covers all places that read a weight."""
    model = getattr(families, family)().eval()
    spec = spec_of(name, family, quantize=kind)
    try:
        graftc.check(graftc.Spec.model_validate(spec_of(name, family)), model)
    except GraftError as error:
        assert error.code in ("GC014", "GC015")
        raise unittest.SkipTest(f"not on this family: {error.message}") from None
    output, tensors = trained(spec, model, family)
    wanted, others = trained(spec_of(name, family), dense_twin(model, quantize=kind), family)
    assert tensors.keys() == others.keys()
    # DoRA's norms are products whose rounding depends on the processor.
    bound = 2e-6 if name == "dora" else 0.0
    for one, other in ((output, wanted), *((tensors[key], others[key]) for key in others)):
        torch.testing.assert_close(one, other, rtol=0, atol=bound)


@pytest.mark.full
@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("family", ["gpt2", "llama", "mixtral"])
def test_loftq_is_nearer_to_the_model_as_it_was(family: str, kind: str) -> None:
    """The initial factors are the best approximation, of their rank, to what quantisation has lost."""
    model = getattr(families, family)().eval()
    compiled = graftc.compile(graftc.Spec.model_validate(spec_of("loftq", family, quantize=kind)), model)
    store, before = compiled.compilation.store, dict(model.named_parameters())
    seen = 0
    for site, spec in compiled.compilation.main.resolved[0].places:
        name = site.own.tensor
        lost = site.own.operand(before[name].detach() - dense(store.get(name)))
        parts = compiled.compilation.parts["lora"][site.key]
        a, b = (store.get(parts[part]).detach() for part in "AB")
        s = torch.linalg.svdvals(lost)[..., spec.rank :].square().sum(-1).sqrt()
        torch.testing.assert_close((lost - spec.scaling * b @ a).flatten(-2).norm(dim=-1), s, rtol=1e-4, atol=1e-6)
        assert name in store.packed
        seen += 1
    assert seen


def test_loftq_needs_what_was_quantised() -> None:
    """A base in full precision has lost nothing, so LoftQ raises GC167."""
    with pytest.raises(GraftError) as caught:
        graftc.compile(graftc.Spec.model_validate(spec_of("loftq", "llama")), families.llama())
    assert caught.value.code == "GC167"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["full", "pruning"])
def test_copies_of_packed_weights_are_saved(name: str, tmp_path: Path) -> None:
    """An artifact with trained copies of packed weights loads, and computes the same."""
    model = families.llama().eval()
    spec = {"adapt": [{"method": name, "target": {"role": "attn.q"}}], "base": {"quantize": "nf4"}}
    compiled = graftc.compile(spec, model).eval()
    perturb(compiled)
    compiled.save(tmp_path / "artifact")
    loaded, inputs = graftc.load(tmp_path / "artifact", model).eval(), inputs_for(compiled)
    assert torch.equal(compiled(**inputs)[0], loaded(**inputs)[0])


@pytest.mark.slow
def test_dropped_and_skipped_modules() -> None:
    """Heads, embeddings, routers and skipped modules are not quantised; the source is unchanged."""
    model = families.mixtral().eval()
    before = {name: (id(p), p.clone()) for name, p in model.named_parameters()}
    spec = graftc.Spec.model_validate(
        {"base": {"quantize": "nf4", "skip": ["**.k_proj"]}, "adapt": [{"method": "lora", "target": EXPERTS}]}
    )
    compiled = graftc.compile(spec, model)
    packed = compiled.compilation.store.packed
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in packed} == {"q_proj", "v_proj", "o_proj", "experts"}
    assert all(id(p) == before[n][0] and torch.equal(p, before[n][1]) for n, p in model.named_parameters())
    assert type(model.model.layers[0].self_attn.q_proj) is nn.Linear
    weight = compiled.compilation.store.get("model.layers.0.self_attn.q_proj.weight")
    assert isinstance(weight, PackedTensor) and weight.shape == (48, 48)
    report = graftc.check(spec, model)
    assert report.base_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.slow
def test_the_weights_can_be_read() -> None:
    """A module of the compiled model still has a weight, and the class of the source's module."""
    model = families.llama().eval()
    compiled = graftc.compile(graftc.Spec.model_validate(spec_of("lora", "llama", quantize="int8")), model)
    module = compiled.model.layers[0].mlp.down_proj
    assert isinstance(module, nn.Linear) and module.weight.shape == (48, 80)
    scale = model.model.layers[0].mlp.down_proj.weight.abs().amax(1, keepdim=True) / 127.5
    assert bool(((module.weight - model.model.layers[0].mlp.down_proj.weight).abs() <= scale * 0.6).all())


def test_nothing_to_quantise() -> None:
    """A model whose linear maps are all skipped raises GC160."""
    spec = graftc.Spec.model_validate(
        {"base": {"quantize": "nf4", "skip": ["model.layers.*"]}, "adapt": [{"method": "lora", "target": MAPS}]}
    )
    with pytest.raises(GraftError) as caught:
        graftc.compile(spec, families.llama())
    assert caught.value.code == "GC160"


class Twice(nn.Module):
    """Layers whose weights are read in both orientations, with the first one used again as the last, and a head."""

    class Layer(nn.Module):
        """A layer with two maps, each read in both orientations."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 48), nn.Linear(48, 16)

        def forward(self, h: Tensor) -> Tensor:
            """Apply both maps, and both transposed."""
            turned: Tensor = (h @ self.b.weight) @ self.a.weight
            return h + self.b(self.a(h).relu()) + turned * 0.1

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(self.Layer() for _ in range(2))
        self.layers.append(self.layers[0])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Apply all layers and the head."""
        for layer in self.layers:
            x = layer(x)
        output: Tensor = self.head(x)
        return output


@pytest.mark.slow
def test_weights_that_are_read_in_both_orientations() -> None:
    """Such weights are packed, unlike the head; targets refused on the plain model are refused here as well."""
    torch.manual_seed(0)
    model, x = Twice().eval(), {"x": torch.randn(3, 16)}
    adapt = [{"method": "lora", "target": {"modules": "layers.1.a"}}]
    compiled = graftc.compile({"adapt": adapt, "base": {"quantize": "int4", "group": 7}}, model, x).eval()
    packed = {f"layers.{layer}.{name}.weight" for layer in range(3) for name in "ab"}
    assert set(compiled.compilation.store.packed) == packed
    with torch.no_grad():
        assert torch.equal(compiled(**x), compiled.compilation.source(**x))
    bases: tuple[dict[str, Any], ...] = ({}, {"base": {"quantize": "int4"}})
    for base in bases:
        with pytest.raises(GraftError) as caught:
            graftc.compile({"adapt": [{"method": "lora", "target": {"modules": "layers.2.a"}}], **base}, model, x)
        assert caught.value.code == "GC017"


@pytest.mark.full
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_modules_that_train_in_full(family: str) -> None:
    """A dense copy of a packed weight trains instead of it, as on the dense twin."""
    model = getattr(families, family)().eval()
    path = {"gpt2": "transformer.h.0.mlp", "llama": "model.layers.0.mlp.down_proj"}[family]
    spec: dict[str, Any] = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}], "train": [path]}
    output, tensors = trained({**spec, "base": {"quantize": "nf4"}}, model, family)
    wanted, others = trained(spec, dense_twin(model, quantize="nf4"), family)
    assert torch.equal(output, wanted) and tensors.keys() == others.keys()


@pytest.mark.full
def test_where_a_pattern_of_skip_is_wrong() -> None:
    """The error names the list that contains the pattern."""
    spec = {"adapt": [{"method": "lora", "target": MAPS}], "base": {"quantize": "nf4", "skip": ["**.zzz"]}}
    with pytest.raises(GraftError) as caught:
        graftc.compile(spec, families.llama())
    assert caught.value.code == "GC011" and caught.value.place is not None
    assert caught.value.place.path == "base.skip[0]"
