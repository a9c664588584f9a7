"""(IA)^3: the contract, both ends of a map, rotary positions, stacking with LoRA, and published counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.compiler.folding.steps import lazy_tensors
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import fresh
from tests.kit.specs import varied
from tests.passes.methods.places import OTHERS

IA3: dict[str, Any] = {"method": "ia3"}

FFN = {
    "bert": ("bert.encoder.layer.{}.output.dense", 80),
    "gpt2": ("transformer.h.{}.mlp.c_proj", 80),
    "llama": ("model.layers.{}.mlp.down_proj", 80),
    "gpt_neox": ("gpt_neox.layers.{}.mlp.dense_4h_to_h", 80),
}


class TestIA3(MethodContract):
    """(IA)^3 on keys, values and inner activations in ``Conv1D``, two of them rows of a fused matrix."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "ia3"}
    families = ("gpt2",)


class TestEverywhere(TestIA3):
    """(IA)^3 with interleaved rows, grouped queries, cross-attention, and separate projections."""

    variant = True
    families = OTHERS


class TestBesideExperts(MethodContract):
    """(IA)^3 on attentions only, in a model whose feed-forward parts are all made of experts."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {"method": "ia3", "target": {"role": ["attn.k", "attn.v"]}}
    families = ("mixtral",)


class TestInputs(MethodContract):
    """(IA)^3 on the inputs of every projection, including rows of a fused matrix."""

    variant = True
    adaptation: ClassVar[dict[str, Any]] = {
        "method": "ia3",
        "target": {"role": ["attn.q", "attn.k", "attn.v", "ffn.up", "ffn.down"]},
        "side": "input",
    }
    families = ("gpt2", "gpt_neox", "t5")


class TestDeployed(DeploymentContract):
    """Export and compilation with fused rows, and with grouped queries and rotary positions."""

    adaptation: ClassVar[dict[str, Any]] = {"method": "ia3"}
    families = ("gpt2", "llama")


def vectors(compiled: Any) -> dict[str, Tensor]:
    """Trainable tensors by name."""
    return {name: tensor.detach() for name, tensor in compiled.named_parameters() if tensor.requires_grad}


@pytest.mark.full
def test_shapes_and_start() -> None:
    """Each place has one vector of ones, as wide as grouped keys and values or as the inner activation."""
    tensors = vectors(fresh("llama", IA3))
    sizes = {"self_attn.k_proj": 24, "self_attn.v_proj": 24, "mlp.down_proj": 80}
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        f"model.layers.{i}.{module}.graftc.ia3.l": (size,) for i in (0, 1) for module, size in sizes.items()
    }
    assert all(bool((t == 1).all()) for t in tensors.values())


@pytest.mark.full
def test_every_attention_of_an_encoder_and_a_decoder() -> None:
    """Keys and values of self- and cross-attention train, and the feed-forward parts of both stacks."""
    names = set(vectors(fresh("t5", IA3)))
    assert len(names) == 2 * 3 + 2 * 5
    assert sum("EncDecAttention" in name for name in names) == 2 * 2


@pytest.mark.slow
@pytest.mark.sample("gpt2")
@pytest.mark.parametrize("family", FFN)
def test_zero_leaves_the_bias_of_the_feed_forward(family: str) -> None:
    """With ``l_ff = 0`` a feed-forward part gives ``b2`` at every token, since its inner activation is scaled."""
    model = tiny(family)
    compiled = fresh(model, IA3)
    name, width = FFN[family]
    zero = {f"{name.format(i)}.graftc.ia3.l": torch.zeros(width) for i in (0, 1)}
    compiled.load_adapter_state_dict(vectors(compiled) | zero)
    inputs = inputs_for(compiled)
    scaled = outputs_of(compiled, inputs)
    seen: list[Tensor] = []
    for index in (0, 1):
        module = model.get_submodule(name.format(index))
        constant = module.bias if module.bias is not None else torch.zeros(48)

        def give(module: nn.Module, args: Any, output: Tensor, value: Tensor = constant) -> Tensor:
            seen.append(output)
            return value.expand_as(output)

        module.register_forward_hook(give)
    assert largest_difference(scaled, outputs_of(model, inputs)) <= 1e-6
    assert len(seen) == 2 and bool(seen[0].std(0).max() > 0.1)


class Parts(nn.Module):
    """The three places of a layer, each with the output that is linear in the vector there."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(12, 8), nn.Linear(12, 8), nn.Linear(12, 8)
        self.up, self.down = nn.Linear(12, 20), nn.Linear(20, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return scores, mixed values and the feed-forward part's output for ``[batch, sequence, 12]``."""
        scores = self.q(x) @ self.k(x).transpose(1, 2)
        return scores, scores.softmax(-1) @ self.v(x), self.down(nn.functional.gelu(self.up(x)))


@pytest.mark.full
@pytest.mark.parametrize(("index", "place", "width"), [(0, "k", 8), (1, "v", 8), (2, "down", 20)])
def test_multilinear(index: int, place: str, width: int) -> None:
    """Scores are linear in ``l_k``, mixed values in ``l_v``, and a feed-forward part's output in ``l_ff`` except for
    ``b2``, whatever the other vectors are.
    """
    model, x = Parts().double(), torch.randn(3, 5, 12, dtype=torch.float64)
    entries = [{"method": "ia3", "target": {"modules": ["k", "v"]}}]
    entries.append({"method": "ia3", "name": "inner", "target": {"modules": "down"}, "side": "input"})
    compiled = fresh(model, *entries, inputs={"x": x})
    perturb(compiled, 0.5)
    name = f"{place}.graftc.{'inner' if place == 'down' else 'ia3'}.l"

    def at(value: Tensor) -> Tensor:
        compiled.load_adapter_state_dict(vectors(compiled) | {name: value})
        with torch.no_grad():
            output: Tensor = compiled(x)[index]
        return output

    a, b = torch.randn(2, width, dtype=torch.float64)
    zero = at(torch.zeros_like(a))
    constant = model.down.bias.detach() if place == "down" else torch.zeros(())
    torch.testing.assert_close(zero, constant.expand_as(zero).double(), rtol=0, atol=0)
    torch.testing.assert_close(at(2 * a - 3 * b) - zero, 2 * (at(a) - zero) - 3 * (at(b) - zero), rtol=0, atol=1e-12)
    assert float((at(a) - at(b)).abs().max()) > 0.1


@pytest.mark.full
@pytest.mark.parametrize(("side", "expected"), [("output", (48, 48)), ("input", (80, 80)), ("auto", (80, 80))])
def test_sides(side: str, expected: tuple[int, int]) -> None:
    """``auto`` is the input of ``ffn.down``; either side can be requested."""
    entry = {"method": "ia3", "target": {"role": "ffn.down"}, "side": side}
    assert tuple(len(t) for t in vectors(fresh("bert", entry)).values()) == expected


@pytest.mark.full
def test_auto_is_the_output_elsewhere() -> None:
    """A place named by its module has the side of its role; all other projections are scaled at their outputs."""
    model = tiny("llama")
    target = {"modules": ["**.down_proj", "**.up_proj", "**.q_proj"]}
    tensors = vectors(fresh(model, varied(IA3, target=target)))
    sizes = {name.split(".")[4]: len(tensor) for name, tensor in tensors.items()}
    assert sizes == {"down_proj": 80, "up_proj": 80, "q_proj": 48}


@pytest.mark.full
def test_overrides() -> None:
    """The side may differ by site, in the graph and in the fold."""
    model = tiny("bert")
    entry = {"method": "ia3", "target": {"role": "ffn.down"}, "overrides": [{"layers": 0, "side": "output"}]}
    compiled = fresh(model, entry)
    tensors = perturb(compiled, 0.3)
    assert [len(t) for t in tensors.values()] == [48, 80]
    exact = lazy_tensors(compiled.compilation).exact
    for index, scale in enumerate(t.double() for t in tensors.values()):
        name = f"bert.encoder.layer.{index}.output.dense"
        weight, bias = (model.get_parameter(f"{name}.{part}").detach().double() for part in ("weight", "bias"))
        expected = (weight * scale[:, None], bias * scale) if index == 0 else (weight * scale, bias)
        torch.testing.assert_close(exact(f"{name}.weight"), expected[0], rtol=0, atol=1e-15)
        torch.testing.assert_close(exact(f"{name}.bias"), expected[1], rtol=0, atol=1e-15)


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_keys_are_scaled_before_the_rotation(family: str) -> None:
    """Rotary positions rotate the scaled keys, so the vector folds into rows of the key projection."""
    model = tiny(family)
    compiled = fresh(model, varied(IA3, "attn.k"))
    perturb(compiled, 0.5)
    inputs = inputs_for(compiled, (2, 11))
    merged = compiled.merge()
    assert merged.certificate.passed
    assert largest_difference(outputs_of(merged, inputs), outputs_of(compiled, inputs)) <= 1e-5
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 0.1


LORA = {"method": "lora", "target": {"role": ["attn.k", "ffn.down"]}, "rank": 4, "alpha": 4, "dropout": 0.1}
VECTOR = {"method": "ia3", "target": {"role": ["attn.k", "ffn.down"]}}
Order = Callable[[Tensor, Tensor, Tensor], Tensor]


@pytest.mark.full
@pytest.mark.parametrize("side", ["auto", "input"])
@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "t5"])
def test_order_of_lora_and_ia3(family: str, side: str) -> None:
    """On the same rows, LoRA and then the vector is ``(W + B A) l``, the vector and then LoRA ``W l + B A``; each order
    folds to what it computes, and the two functions differ.
    """
    model, results = tiny(family), []
    for entries in ((LORA, {**VECTOR, "side": side}), ({**VECTOR, "side": side}, LORA)):
        compiled = fresh(model, *entries)
        inputs = inputs_for(compiled)
        assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
        tensors = results[0][1] if results else perturb(compiled, 0.3)
        compiled.load_adapter_state_dict(tensors)
        outputs = outputs_of(compiled, inputs)
        assert largest_difference(outputs_of(compiled.merge(), inputs), outputs) <= 2e-5
        results.append((outputs, tensors, lazy_tensors(compiled.compilation)))
    assert largest_difference(results[0][0], results[1][0]) > 1e-2
    for name in results[0][2].names:
        if not name.endswith("weight"):
            continue
        base = model.get_parameter(name).detach().double()
        module = name.rpartition(".")[0]
        part = ".k" if any(f"{module}.graftc.lora.k." in key for key in results[0][1]) else ""
        a, b = (results[0][1][f"{module}.graftc.lora{part}.{f}"].double() for f in "AB")
        scale = results[0][1][f"{module}.graftc.ia3{part}.l"].double()
        rows = slice(48, 96) if family == "gpt2" and part else slice(None)
        if family == "gpt_neox" and part:
            rows = torch.arange(144).reshape(4, 3, 12)[:, 1].flatten()
        turned = family == "gpt2"
        weight = (base.T if turned else base)[rows]
        inward = side == "input" or (not part and scale.numel() == 80)
        along = scale if inward else scale[:, None]
        for (_, _, lazy), expected in zip(results, ((weight + b @ a) * along, weight * along + b @ a), strict=True):
            after = (lazy.exact(name).T if turned else lazy.exact(name))[rows]
            torch.testing.assert_close(after, expected, rtol=0, atol=1e-13)


@pytest.mark.full
def test_shared_dropout_stays_with_the_others() -> None:
    """LoRA's sites share the dropout of their input; scaling the input of one leaves the other branches unchanged."""
    model = tiny("llama")
    lora = {"method": "lora", "target": {"role": "attn.{q,k,v}"}, "rank": 4, "dropout": 0.1}
    for module in ("q_proj", "k_proj", "v_proj"):
        entry = {"method": "ia3", "target": {"modules": f"**.{module}"}, "side": "input"}
        compiled = fresh(model, lora, entry)
        perturb(compiled, 0.1)
        inputs = inputs_for(compiled)
        assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 1e-5
        target = torch.ops.graftc.masked_dropout.default
        drops = compiled.program("train").graph.find_nodes(op="call_function", target=target)
        # One for the two other sites and one for this one, in each layer.
        assert sorted(len(node.users) for node in drops) == [1, 1, 2, 2]


@pytest.mark.full
@pytest.mark.parametrize("side", ["output", "input"])
def test_a_convolution_over_patches(side: str) -> None:
    """The channels of the output or those of the input have a vector, the same for all points of a patch."""
    entry = {"method": "ia3", "side": side, "target": {"modules": "**.patch_embeddings.projection"}}
    model = tiny("vit")
    compiled = fresh(model, entry)
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled.merge(), inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.full
def test_experts_are_refused() -> None:
    """The default target finds no feed-forward projection to scale, and experts are sites of another kind."""
    with pytest.raises(GraftError) as error:
        fresh("mixtral", IA3)
    assert error.value.code == "GC015"
    with pytest.raises(GraftError) as error:
        fresh("mixtral", varied(IA3, "experts"))
    assert error.value.code == "GC016"


T0_3B = {"d_model": 2048, "d_ff": 5120, "d_kv": 64, "num_heads": 32, "num_layers": 24, "num_decoder_layers": 24}
COUNTS = {
    "BERT-base": ("BertForSequenceClassification", "BertConfig", {}, 12 * (2 * 768 + 3072), 55_296),
    "LLaMA-7B": ("LlamaForCausalLM", "LlamaConfig", {}, 32 * (2 * 4096 + 11008), 614_400),
    "T0-3B": (
        *("T5ForConditionalGeneration", "T5Config"),
        {**T0_3B, "feed_forward_proj": "gated-gelu"},
        24 * (2 * 2048 + 5120) + 24 * (4 * 2048 + 5120),
        540_672,
    ),
}


@pytest.mark.full
@each_way
@pytest.mark.parametrize("name", COUNTS)
def test_published_counts(name: str, count: Any) -> None:
    """The count is ``L (2 d_kv + f)`` for one stack, and ``L_e (2 d_kv + f) + L_d (4 d_kv + f)`` for two stacks."""
    cls, config, values, formula, published = COUNTS[name]
    report = count([{"method": "ia3"}], (cls, config, values))
    assert report.trainable_parameters == report.deployed_parameters == formula == published


@pytest.mark.parametrize("channels", [9, 18])
def test_groups_as_many_as_points(channels: int) -> None:
    """With nine groups and a 3x3 kernel, a row of the weight is as long as the vector but is not its counterpart."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(channels, 18, 3, groups=9), nn.Flatten(), nn.Linear(72, 3)).eval()
    x = torch.randn(2, channels, 4, 4)
    compiled = graftc.compile(
        {"adapt": [{"method": "ia3", "side": "input", "target": {"modules": "0"}}]}, model, {"input": x}
    ).eval()
    perturb(compiled, 0.3)
    with torch.no_grad():
        torch.testing.assert_close(compiled.merge()(x), compiled(x))
