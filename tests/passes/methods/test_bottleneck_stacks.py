"""Combinations of bottleneck adapters: in shared layers, in several sublayers of a kind, stacked, and with LoRA."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.core.ir.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import adapted
from tests.kit.wide import FAMILIES
from tests.passes.methods.bottleneck_references import adapter, replace_output

PFEIFFER = {"method": "pfeiffer", "bottleneck": 5}
HOULSBY = {"method": "houlsby", "bottleneck": 5}


# --- shared layers, and several sublayers of a kind -----------------------------------------------------------


@pytest.mark.full
def test_a_shared_layer_has_one_adapter() -> None:
    """ALBERT's layer runs twice with one adapter, which gets gradients from both runs."""
    albert = FAMILIES["albert"]
    model, plain = albert.model(), albert.model()
    compiled = adapted(model, {**HOULSBY, "target": {"role": "ffn.sublayer"}}, noise=0.3)
    tensors = compiled.adapter_state_dict()
    assert len(tensors) == 4
    group = "albert.encoder.albert_layer_groups.0"
    assert all(name.startswith(f"{group}.graftc.houlsby.ffn.") for name in tensors)
    assert compiled.report.adaptations[0].trainable_parameters == 2 * 48 * 5 + 48 + 5
    assert len(compiled.compilation.main.resolved[0].sites) == 2
    run = adapter(tensors, f"{group}.graftc.houlsby.ffn.", "gelu_tanh")
    replace_output(plain.get_submodule(f"{group}.albert_layers.0.ffn_output"), lambda g: g + run(g))
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) <= 1e-5
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 0.01


@pytest.mark.full
@pytest.mark.parametrize("method", ["pfeiffer", "he_parallel", "adapter_l"])
def test_zero_up_on_a_shared_layer(method: str) -> None:
    """Both uses of an adapter give the base if the adapter is zero."""
    model = FAMILIES["albert"].model()
    compiled = adapted(model, {"method": method, "bottleneck": 5}, noise=0.3)
    tensors = compiled.adapter_state_dict()
    compiled.load_adapter_state_dict({n: torch.zeros_like(t) if ".up" in n else t for n, t in tensors.items()})
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))


class Half(nn.Module):
    """A layer with a feed-forward part before its attention and one after it, each added by half, as in a Conformer."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(24) for _ in range(3))
        self.first = nn.ModuleList([nn.Linear(24, 40), nn.Linear(40, 24)])
        self.q, self.k, self.v, self.o = (nn.Linear(24, 24) for _ in range(4))
        self.second = nn.ModuleList([nn.Linear(24, 36), nn.Linear(36, 24)])

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, sequence, 24]`` to the same shape."""
        up, down = self.first
        x = x + 0.5 * down(nn.functional.silu(up(self.norms[0](x))))
        y = self.norms[1](x)
        x = x + self.o(nn.functional.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y)))
        up, down = self.second
        return x + 0.5 * down(nn.functional.silu(up(self.norms[2](x))))


class Conformer(nn.Module):
    """Two layers of `Half` and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Half() for _ in range(2))
        self.head = nn.Linear(24, 7)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[batch, sequence, 24]`` to ``[batch, sequence, 7]``."""
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


PLACES = [f"layers.{layer}.{part}.1" for layer in (0, 1) for part in ("first", "second")]


@pytest.mark.full
def test_two_feed_forward_parts_of_a_layer_have_their_own() -> None:
    """Each feed-forward part has its own adapter, which acts after the factor of one half."""
    model, x = Conformer().double().eval(), torch.randn(3, 6, 24, dtype=torch.float64)
    compiled = adapted(model, {**HOULSBY, "target": {"role": "ffn.sublayer"}}, noise=0.3, inputs={"x": x})
    tensors = {name: tensor.clone() for name, tensor in compiled.adapter_state_dict().items()}
    assert len(tensors) == 2 * 2 * 4
    prefixes = sorted({name.rpartition(".")[0] for name in tensors})
    assert len(prefixes) == 4
    fits = []
    for prefix in prefixes:
        selected = {n: t for n, t in tensors.items() if n.rpartition(".")[0] == prefix}
        compiled.load_adapter_state_dict({n: torch.zeros_like(t) for n, t in tensors.items()} | selected)
        actual, run = compiled(x), adapter(selected, f"{prefix}.", "gelu_tanh")
        for place in PLACES:
            plain = copy.deepcopy(model)
            replace_output(plain.get_submodule(place), lambda g, run=run: g + 2 * run(0.5 * g))  # halved by the layer
            if largest_difference([actual], [plain(x)]) <= 1e-12:
                fits.append(place)
    assert fits == list(PLACES)


@pytest.mark.full
def test_behind_stochastic_depth_and_beside_windows() -> None:
    """Swin drops whole branches in training and attends within windows, so its heads are not in the order of the
    stream, as the error says.
    """
    model = FAMILIES["swin"].model()
    compiled = adapted(model, HOULSBY, noise=0.3)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(model, inputs)) > 0.01
    compiled.load_adapter_state_dict(
        {n: torch.zeros_like(t) if ".up" in n else t for n, t in compiled.adapter_state_dict().items()}
    )
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))
    with pytest.raises(GraftError, match="have different layouts") as error:
        graftc.compile({"adapt": [{"method": "he_parallel", "target": {"role": "attn.sublayer"}}]}, model)
    assert error.value.code == "GC017"


# --- stacked adapters -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_on_one_branch() -> None:
    """The second adapter reads the branch as changed by the first."""
    model, plain = tiny("gpt2", dtype=torch.float64), tiny("gpt2", dtype=torch.float64)
    target = {"role": "ffn.sublayer"}
    compiled = adapted(
        model, {**HOULSBY, "target": target}, {"method": "he_sequential", "bottleneck": 6, "scale": 2.0}, noise=0.3
    )
    tensors = compiled.adapter_state_dict()
    for index in (0, 1):
        block = plain.transformer.h[index]
        one = adapter(tensors, f"transformer.h.{index}.graftc.houlsby.ffn.", "gelu_tanh")
        two = adapter(tensors, f"transformer.h.{index}.graftc.he_sequential.ffn.", "relu", 2.0)
        replace_output(block.mlp, lambda g, one=one: g + one(g))
        replace_output(block.mlp, lambda g, two=two: g + two(g))
    inputs = inputs_for(compiled)
    expected = outputs_of(plain, inputs)
    scale = max(1.0, *(float(t.abs().max()) for t in expected))
    assert largest_difference(outputs_of(compiled, inputs), expected) <= 1e-12 * scale


@pytest.mark.full
@pytest.mark.parametrize("reads", ["branch", "sum", "output", "stream"])
def test_behind_pfeiffer(reads: str) -> None:
    """An adapter on top of Pfeiffer's reads every value of the sublayer with Pfeiffer's change in it."""
    model, plain = tiny("bert", dtype=torch.float64), tiny("bert", dtype=torch.float64)
    top = {"method": "bottleneck", "name": "top", "reads": reads, "adds_to": "output", "bottleneck": 4}
    compiled = adapted(model, PFEIFFER, top, noise=0.3)
    tensors = compiled.adapter_state_dict()
    for index in (0, 1):
        prefix = f"bert.encoder.layer.{index}.graftc"
        one, two = (adapter(tensors, f"{prefix}.{name}.ffn.", "relu") for name in ("pfeiffer", "top"))

        def hook(module: Any, args: Any, u: Tensor, one: Any = one, two: Any = two) -> Tensor:
            inner, h = args
            z = module.dense(inner) + one(u)
            y = module.LayerNorm(z + h)
            total: Tensor = y + two({"branch": z, "sum": z + h, "output": y, "stream": h}[reads])
            return total

        plain.bert.encoder.layer[index].output.register_forward_hook(hook)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) <= 1e-11


@pytest.mark.full
def test_an_adapter_behind_runs_again_on_what_pfeiffer_adds() -> None:
    """AdapterL follows the layer. Pfeiffer's adapter, inserted later, reads after both and adds before both."""
    model, plain = tiny("bert", dtype=torch.float64), tiny("bert", dtype=torch.float64)
    compiled = adapted(model, {"method": "adapter_l", "bottleneck": 4}, PFEIFFER, noise=0.3)
    tensors = compiled.adapter_state_dict()
    for index in (0, 1):
        prefix = f"bert.encoder.layer.{index}.graftc"
        behind, own = (adapter(tensors, f"{prefix}.{name}.ffn.", "relu") for name in ("adapter_l", "pfeiffer"))

        def hook(module: Any, args: Any, u: Tensor, behind: Any = behind, own: Any = own) -> Tensor:
            inner, h = args
            g = module.dense(inner)
            y = module.LayerNorm(g + own(u + behind(u)) + h)
            total: Tensor = y + behind(y)
            return total

        plain.bert.encoder.layer[index].output.register_forward_hook(hook)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) <= 1e-11


@pytest.mark.full
def test_adapters_of_parallel_branches() -> None:
    """GPT-NeoX adds attention and feed-forward in one sum. The feed-forward's adapter reads that sum including the
    attention's adapter, which is not recomputed for it.
    """
    model, plain = tiny("gpt_neox", dtype=torch.float64), tiny("gpt_neox", dtype=torch.float64)
    target = {"role": ["attn.sublayer", "ffn.sublayer"]}
    compiled = adapted(model, {**PFEIFFER, "target": target, "dropout": 0.1}, noise=0.3)
    tensors = compiled.adapter_state_dict()
    for index in (0, 1):
        layer = plain.gpt_neox.layers[index]
        prefix = f"gpt_neox.layers.{index}.graftc.pfeiffer"
        attention, feed_forward = (adapter(tensors, f"{prefix}.{part}.", "relu") for part in ("attn", "ffn"))

        def hook(module: Any, args: Any, output: Any, one: Any = attention, two: Any = feed_forward) -> Any:
            total = output[0] if isinstance(output, tuple) else output
            total = total + one(total)
            total = total + two(total)
            return (total, *output[1:]) if isinstance(output, tuple) else total

        layer.register_forward_hook(hook)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) <= 1e-11


# --- combination with LoRA ------------------------------------------------------------------------------------

LORA = {"method": "lora", "target": {"role": ["attn.o", "ffn.down"]}, "rank": 4, "alpha": 8, "dropout": 0.1}


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.parametrize("method", ["houlsby", "pfeiffer", "he_parallel", "bottleneck"])
def test_lora_below_an_adapter(method: str, family: str) -> None:
    """LoRA belongs to the map whether inserted before or after the adapter: both orders compute one function, in which
    LoRA folds while the adapter stays.
    """
    model = tiny(family)
    entry = {"method": method, "bottleneck": 5}
    if method == "bottleneck":
        entry |= {"reads": "inner", "adds_to": "projection"}
    results, tensors = [], None
    for entries in ((LORA, entry), (entry, LORA)):
        compiled = graftc.compile({"adapt": list(entries)}, model).eval()
        tensors = tensors or perturb(compiled, 0.1)
        compiled.load_adapter_state_dict(tensors)
        for program in (compiled.program("train"), compiled.program("eval")):
            verify(program, compiled.compilation.store, "the test", types=True)
        inputs = inputs_for(compiled)
        outputs = outputs_of(compiled, inputs)
        partial = compiled.merge_partially()
        assert partial.folded == ("lora",) and set(partial.kept) == {method}
        assert partial.certificate.passed
        kept = set(partial.compiled.adapter_state_dict())
        assert kept == {n for n in tensors if f".graftc.{method}." in n}
        assert largest_difference(outputs_of(partial.compiled, inputs), outputs) <= 2e-5
        assert largest_difference(outputs, outputs_of(model, inputs)) > 0.01
        results.append(outputs)
    assert largest_difference(*results) <= 2e-5


@pytest.mark.full
@pytest.mark.parametrize("placement", ["input", "output", "parallel"])
@pytest.mark.parametrize("first", ["lora", "llm_adapters"])
def test_lora_beside_an_adapter_of_the_same_map(first: str, placement: str) -> None:
    """On one map, the adaptation inserted second acts on the result of the first, or adds to it."""
    model, plain = tiny("llama", dtype=torch.float64), tiny("llama", dtype=torch.float64)
    entry = {"method": "llm_adapters", "placement": placement, "bottleneck": 5}
    lora = {**LORA, "target": {"role": "ffn.down"}}
    compiled = adapted(model, *((lora, entry) if first == "lora" else (entry, lora)), noise=0.3)
    tensors = compiled.adapter_state_dict()
    for index in (0, 1):
        name = f"model.layers.{index}.mlp.down_proj"
        run = adapter(tensors, f"{name}.graftc.llm_adapters.", "tanh")
        a, b = (tensors[f"{name}.graftc.lora.{part}"] for part in "AB")

        def hook(module: Any, args: Any, z: Tensor, run: Any = run, update: Tensor = 2 * b @ a) -> Tensor:
            x = args[0]
            low = x @ update.T
            if placement == "parallel":
                return z + low + run(x)
            if placement == "output":
                return z + low + run(z + low) if first == "lora" else z + run(z) + low
            inner = x + run(x)
            behind = inner if first == "lora" else x
            return inner @ module.weight.T + behind @ update.T

        plain.get_submodule(name).register_forward_hook(hook)
    for program in (compiled.program("train"), compiled.program("eval")):
        verify(program, compiled.compilation.store, "the test", types=True)
    inputs = inputs_for(compiled)
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(plain, inputs)) <= 1e-11
    with pytest.raises(GraftError, match="its own activation function") as error:
        compiled.merge()
    assert error.value.code == "GC050"
