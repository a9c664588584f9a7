"""Training of base tensors in place: full, the last layers, biases, and cross-attention."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for, largest_difference
from graftc.testing.families import tiny
from tests.kit.training import after_decay


class TestFull(MethodContract):
    """Full fine-tuning of every parameter."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "full"}


class TestLastLayers(MethodContract):
    """Every parameter of the last layer."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "last_layers", "count": 1}


class TestBitFit(MethodContract):
    """The existing biases. A transposed weight would only show if it were not square, but no weight trains."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "bitfit"}
    families = ("bert", "gpt2", "gpt_neox", "vit")


class TestAddedBiases(MethodContract):
    """Biases that are added to models without any."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "bitfit", "add_missing": True}
    families = ("llama", "mixtral", "t5")


class TestCrossAttention(MethodContract):
    """The projections of cross-attention."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "cross_attention"}
    families = ("t5",)

    def model(self, family: str) -> nn.Module:
        """Return a model whose heads' widths do not add up to the model's."""
        return tiny(family, d_kv=10)


class TestFusedQueries(MethodContract):
    """A part of every fused weight, columns in GPT-2 and interleaved rows in GPT-NeoX, and feed-forward maps."""

    variant = True
    adaptation: ClassVar[Mapping[str, Any]] = {"method": "full", "target": {"role": ["attn.q", "ffn.down"]}}
    families = ("gpt2", "gpt_neox")


class TestDeployed(DeploymentContract):
    """Export and compilation of a trained last layer."""

    adaptation: ClassVar[Mapping[str, Any]] = {"method": "last_layers", "count": 1}
    families = ("gpt2",)


def changed(model: nn.Module, after: Mapping[str, Tensor]) -> set[str]:
    """Return the names of the parameters that have changed."""
    return {name for name, before in model.named_parameters() if not torch.equal(before, after[name])}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit", "mixtral"])
def test_every_parameter_trains(family: str) -> None:
    """Each parameter counts once, including tied ones; a compiled model may train beside its source."""
    model = tiny(family)
    compiled = graftc.compile({"adapt": [{"method": "full"}]}, model)
    assert compiled.report.trainable_parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.full
def test_exactly_the_last_layer_changes() -> None:
    """The layer's input is equal to the bit, and nothing below it gets a gradient."""
    model = tiny("gpt2").eval()
    compiled, after = after_decay(model, {"method": "last_layers", "count": 1})
    assert changed(model, after) == {n for n, _ in model.named_parameters() if n.startswith("transformer.h.1.")}
    inputs = {**inputs_for(compiled), "output_hidden_states": True}
    with torch.no_grad():
        states = [m(**inputs).hidden_states[1] for m in (model, compiled)]
    assert torch.equal(*states)


@pytest.mark.full
def test_exactly_the_biases_change() -> None:
    """The biases of keys have negligible gradients, and a head is unchanged."""
    model = tiny("bert").eval()
    _, after = after_decay(model, {"method": "bitfit"})
    biases = {n for n, _ in model.named_parameters() if n.endswith("bias") and not n.startswith("classifier")}
    assert changed(model, after) <= biases
    assert biases - changed(model, after) <= {n for n in biases if "key" in n}


@pytest.mark.full
def test_an_encoder_stays_under_cross_attention() -> None:
    """The encoder's states are the base's, and so are the decoder's other weights."""
    model = tiny("t5").eval()
    compiled, after = after_decay(model, {"method": "cross_attention"})
    assert changed(model, after) == {n for n, _ in model.named_parameters() if ".EncDecAttention." in n}
    inputs = inputs_for(compiled)
    with torch.no_grad():
        states = [m(**inputs).encoder_last_hidden_state for m in (model, compiled)]
    torch.testing.assert_close(*states, rtol=0, atol=1e-5)


@pytest.mark.full
def test_biases_of_queries_alone() -> None:
    """Only the queries' rows of a fused bias change."""
    model = tiny("gpt2").eval()
    compiled = graftc.compile({"adapt": [{"method": "bitfit", "target": {"role": "attn.q"}}]}, model)
    perturb(compiled, 0.1)
    after = dict(compiled.eval().merge().to_transformers().named_parameters())
    for layer in range(2):
        name = f"transformer.h.{layer}.attn.c_attn.bias"
        moved = after[name] != dict(model.named_parameters())[name]
        assert bool(moved[:48].all()) and not bool(moved[48:].any())


@pytest.mark.full
def test_queries_alone() -> None:
    """Only the queries' columns of GPT-2's fused weight and bias change, after AdamW with weight decay."""
    model = tiny("gpt2").eval()
    compiled, after = after_decay(model, {"method": "full", "target": {"role": "attn.q"}})
    assert compiled.report.trainable_parameters == 2 * (48 * 48 + 48)
    before = dict(model.named_parameters())
    names = {f"transformer.h.{layer}.attn.c_attn.{part}" for layer in range(2) for part in ("weight", "bias")}
    assert changed(model, after) == names
    for name in names:
        moved = after[name] != before[name]
        assert bool(moved[..., :48].all()) and not bool(moved[..., 48:].any())


Q = {"role": "attn.q"}
LORA = {"method": "lora", "rank": 4, "target": Q}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize("first", [LORA, {"method": "ia3", "target": {"role": "attn.k"}}], ids=["lora", "ia3"])
def test_copies_are_below_what_came_first(family: str, first: dict[str, Any]) -> None:
    """In the graph and in the fold, adaptations at a place act on the trained tensors, in either order."""
    full = {"method": "full", "target": first["target"]}
    one, other = (graftc.compile({"adapt": e}, tiny(family)).eval() for e in ([first, full], [full, first]))
    perturb(one, 0.1)
    other.load_adapter_state_dict(one.adapter_state_dict())
    inputs = inputs_for(one)
    expected = outputs_of(one, inputs)
    assert same_bits(outputs_of(other, inputs), expected)
    for compiled in (one, other):
        merged = compiled.merge()
        assert merged.certificate.passed and len(merged.folded) == 2
        assert largest_difference(outputs_of(merged, inputs), expected) < 2e-5


@pytest.mark.full
def test_copies_fold_from_below_what_stays() -> None:
    """A bank stays, while a LoRA below it folds, and so does the weight's trained copy, although it comes last."""
    spec = {
        "adapt": [{**LORA, "name": name} for name in ("below", "one", "two")] + [{"method": "full", "target": Q}],
        "compose": [{"name": "pool", "bank": ["one", "two"]}],
    }
    compiled = graftc.compile(spec, tiny("bert")).eval()
    perturb(compiled, 0.1)
    partial = compiled.merge_partially()
    inputs = inputs_for(compiled)
    assert partial.folded == ("below", "full")
    assert largest_difference(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs)) < 2e-5


@pytest.mark.full
@pytest.mark.parametrize("target", [{"role": "embed"}, {"modules": "**"}], ids=["table", "all"])
def test_a_tied_table_folds_without_a_warning(target: dict[str, str]) -> None:
    """All names have one copy, so that folding changes what training has changed."""
    model = tiny("gpt2").eval()
    with warnings.catch_warnings():
        warnings.simplefilter("error", graftc.GraftWarning)
        compiled = graftc.compile({"adapt": [{"method": "full", "target": target}]}, model).eval()
    perturb(compiled, 0.1)
    merged, inputs = compiled.merge(), inputs_for(compiled)
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) < 2e-5


@pytest.mark.full
def test_full_beside_a_prompt() -> None:
    """Both adaptations train; folding leaves the prompt."""
    spec = {"adapt": [{"method": "prompt", "length": 2}, {"method": "full", "target": {"role": "attn.{q,v}"}}]}
    compiled = graftc.compile(spec, tiny("llama")).eval()
    perturb(compiled, 0.1)
    partial = compiled.merge_partially()
    inputs = inputs_for(compiled)
    assert [a.method for a in partial.compiled.compilation.spec.adapt] == ["prompt"]
    assert same_bits(outputs_of(partial.compiled, inputs), outputs_of(compiled, inputs))


@pytest.mark.full
@pytest.mark.parametrize(
    ("family", "entry", "code", "text"),
    [
        ("llama", {"method": "bitfit"}, "GC014", "add_missing: true"),
        ("gpt2", {"method": "cross_attention"}, "GC015", "cross.attn.q"),
        ("gpt2", {"method": "last_layers", "count": 3}, "GC020", "2 layers"),
    ],
    ids=str,
)
def test_what_cannot_train(family: str, entry: dict[str, Any], code: str, text: str) -> None:
    """Each case raises its code."""
    with pytest.raises(GraftError, match=text) as error:
        graftc.compile({"adapt": [entry]}, tiny(family))
    assert error.value.code == code
