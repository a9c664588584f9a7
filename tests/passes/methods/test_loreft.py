"""LoReFT: the contract, and equality with the paper's formula in plain torch."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.passes.methods.loreft import orthonormal
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import FAMILIES, DeploymentContract, MethodContract, largest_difference, outputs_of, same_bits
from graftc.testing.compare import flat, inputs_for
from graftc.testing.families import tiny
from tests.kit.depth import each_way
from tests.kit.models import adapted, fresh
from tests.kit.specs import varied
from tests.reference.loreft import Intervention, intervened, positions

LOREFT: dict[str, Any] = {"method": "loreft", "rank": 3}
ENDS: dict[str, Any] = {**LOREFT, "first": 2, "last": 3}
WITH_TOKENS = tuple(family for family in FAMILIES if family != "vit")


class TestLoReFT(MethodContract):
    """LoReFT at every token, from the paper's initial values."""

    adaptation: ClassVar[dict[str, Any]] = LOREFT
    families: ClassVar[tuple[str, ...]] = ("gpt2",)


@pytest.mark.full
class TestEverywhere(TestLoReFT):
    """LoReFT on the other families."""

    families = tuple(family for family in FAMILIES if family != "gpt2")


class TestEnds(MethodContract):
    """LoReFT at the first and last tokens with separate tensors, starting from the base."""

    variant = True
    cacheable = False
    adaptation: ClassVar[dict[str, Any]] = {**ENDS, "tied": False, "init": "identity", "dropout": 0.1}
    families: ClassVar[tuple[str, ...]] = ("llama",)

    def test_identity_at_init(self, family: str) -> None:
        """Check that ``init: identity`` changes no bit, although the method does not claim it for every spec."""
        model, compiled = self.shared(family)
        inputs = inputs_for(compiled)
        assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))


@pytest.mark.full
class TestEndsEverywhere(TestEnds):
    """LoReFT at the first and last tokens of the other families.

    Classifiers of BERT and RoBERTa read only the first token of the last layer, so its last ones have no gradient.
    """

    families = tuple(family for family in WITH_TOKENS if family not in ("llama", "bert", "roberta"))


class TestDeployed(DeploymentContract):
    """Export and compilation of LoReFT."""

    adaptation: ClassVar[dict[str, Any]] = ENDS
    families = ("bert",)


LAYERS: Mapping[str, tuple[str, ...]] = {
    "bert": ("bert.encoder.layer",),
    "gpt2": ("transformer.h",),
    "llama": ("model.layers",),
    "gpt_neox": ("gpt_neox.layers",),
    "vit": ("vit.layers",),
    "t5": ("encoder.block", "decoder.block"),
}
CASES: Mapping[str, dict[str, Any]] = {
    "all": {},
    "first": {"first": 2},
    "last": {"last": 2},
    "ends": {"first": 2, "last": 3},
    "untied": {"first": 2, "last": 3, "tied": False},
}


def batch_for(compiled: Any, family: str) -> dict[str, Tensor]:
    """Return inputs with padding on both sides, and a row that is shorter than the positions."""
    inputs = inputs_for(compiled, (4, 7))
    if family == "vit":
        return inputs
    mask = torch.ones(4, 7, dtype=torch.int64)
    mask[0, 5:], mask[1, :2], mask[2, 3:] = 0, 0, 0
    return {**inputs, "attention_mask": mask}


def mask_of(inputs: Mapping[str, Tensor], layer: str) -> Tensor:
    """Return the mask of the tokens that a layer reads; a decoder beside an encoder reads no padding here."""
    decoder = inputs.get("decoder_input_ids")
    return inputs["attention_mask"] if decoder is None or "encoder" in layer else torch.ones_like(decoder)


def interventions_of(compiled: Any, layer: str) -> dict[str, Intervention]:
    """Return a layer's interventions with the compiled model's tensors; tied ones are one module."""
    own: dict[str, dict[str, Tensor]] = {}
    for name, tensor in compiled.named_parameters():
        if name.startswith(f"{layer}.graftc."):
            part, _, suffix = name.rpartition(".")[2].partition("_")
            own.setdefault(suffix, {})[part] = tensor.detach()
    modules = {suffix: Intervention(t["rotation"], t["W"], t["b"]) for suffix, t in own.items()}
    return modules if "first" in modules else {"first": modules[""], "last": modules[""]}


def part_of(own: Mapping[str, Intervention], name: str) -> Tensor:
    """Return the reference's parameter for one of graftc's, by its name."""
    part, _, suffix = name.rpartition(".")[2].partition("_")
    module = own[suffix or "first"]
    return {"rotation": module.raw, "W": module.source.weight, "b": module.source.bias}[part]


def below(tensor: Tensor | None, name: str) -> Tensor:
    """Return a tensor, or what has an effect of one with reflections: what is below its diagonal."""
    assert tensor is not None, name
    return tensor.detach().tril(-1) if ".rotation" in name else tensor.detach()


def loss_of(model: nn.Module, inputs: Mapping[str, Tensor], seed: int) -> Tensor:
    """Return the sum of all outputs, weighted at random."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [leaf for leaf in flat(model(**inputs)) if leaf.requires_grad]
    weights = [torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype) for leaf in leaves]
    total: Tensor = torch.stack([(a * b).sum() for a, b in zip(leaves, weights, strict=True)]).sum()
    return total


@pytest.mark.slow
@pytest.mark.sample("bert-untied")
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("family", LAYERS)
def test_equal_to_the_formula(family: str, kind: str) -> None:
    """Outputs, gradients and three steps of AdamW agree in float64, for padded rows and rows that are too short."""
    case = CASES[kind]
    if family == "vit" and case:
        pytest.skip("images have no first and last tokens")
    model = tiny(family).double()
    compiled = adapted(model, {**LOREFT, **case})
    inputs = batch_for(compiled, family)
    layers = {
        f"{stack}.{name}": layer
        for stack in LAYERS[family]
        for name, layer in model.get_submodule(stack).named_children()
    }
    own = [interventions_of(compiled, name) for name in layers]
    where = [
        positions(mask_of(inputs, name), case.get("first", 0), case.get("last", 0)) if case else None for name in layers
    ]
    parts = {
        name: part_of(own[list(layers).index(name.partition(".graftc.")[0])], name)
        for name, tensor in compiled.named_parameters()
        if tensor.requires_grad
    }
    mine = dict(compiled.named_parameters())
    optimisers = [
        torch.optim.AdamW(each, lr=1e-2, weight_decay=0) for each in ([mine[n] for n in parts], list(parts.values()))
    ]
    for step in range(3):
        ours = loss_of(compiled, inputs, step)
        with intervened(list(layers.values()), own, where):
            theirs = loss_of(model, inputs, step)
        assert abs(float(ours.detach() - theirs.detach())) <= 1e-10 * max(1.0, abs(float(theirs.detach())))
        for loss, optimiser in zip((ours, theirs), optimisers, strict=True):
            optimiser.zero_grad()
            torch.autograd.backward(loss)
        for name, other in parts.items():
            expected = below(other.grad, name)
            # BERT's classifier reads only the first token of the last layer.
            assert bool(expected.any()) or (family == "bert" and ".layer.1." in name), f"{name} has no gradient"
            torch.testing.assert_close(below(mine[name].grad, name), expected, rtol=1e-9, atol=1e-10)
        for optimiser in optimisers:
            optimiser.step()
    for name, other in parts.items():
        torch.testing.assert_close(below(mine[name], name), below(other, name), rtol=0, atol=1e-10)


@pytest.mark.parametrize(("width", "rank"), [(5, 1), (6, 2), (7, 3), (48, 8), (33, 33), (80, 21)])
def test_rows_are_orthonormal_and_equal_torchs(width: int, rank: int) -> None:
    """The closed form equals torch's product of reflections, for each member of a batch."""
    raw = torch.randn(2, width, rank, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rows = orthonormal(raw)
    below = raw.tril(-1)
    product = torch.linalg.householder_product(below, 2 / (1 + below.square().sum(-2)))
    torch.testing.assert_close(rows, product.mT, rtol=0, atol=1e-12)
    identity = torch.eye(rank, dtype=torch.float64).expand(2, rank, rank)
    torch.testing.assert_close(rows @ rows.mT, identity, rtol=0, atol=1e-12)


@pytest.mark.slow
def test_start() -> None:
    """W and b are uniform in ±1/sqrt(width), and R is a random orthogonal matrix; or W is R and b is zero."""
    tensors = {n.rpartition(".")[2]: t for n, t in fresh("bert", LOREFT).adapter_state_dict().items() if ".0." in n}
    assert {part: tuple(t.shape) for part, t in tensors.items()} == {"rotation": (48, 3), "W": (3, 48), "b": (3,)}
    assert 0.9 * 48**-0.5 < float(tensors["W"].abs().max()) <= 48**-0.5
    assert 0 < float(tensors["b"].abs().max()) <= 48**-0.5
    tensors = {
        n.rpartition(".")[2]: t
        for n, t in fresh("bert", {**LOREFT, "init": "identity"}).adapter_state_dict().items()
        if ".0." in n
    }
    assert torch.equal(tensors["W"], orthonormal(tensors["rotation"])) and not tensors["b"].any()


@pytest.mark.slow
def test_one_layer_and_its_input() -> None:
    """A target may name layers, and their inputs instead of their outputs."""
    entry = {**LOREFT, "target": {"role": "layer.in", "layers": 1}}
    names = list(fresh("llama", entry).adapter_state_dict())
    assert names and all(name.startswith("model.layers.1.graftc.loreft.layer_in.") for name in names)


@pytest.mark.slow
def test_refusals() -> None:
    """A rank above the width, positions in images, and a call that continues a cache are refused."""
    with pytest.raises(GraftError, match=r"GC020.*rank 49 is too large"):
        fresh("llama", {**LOREFT, "rank": 49})
    with pytest.raises(GraftError, match=r"GC017.*has no first or last tokens"):
        fresh("vit", ENDS)
    compiled = adapted("llama", {**LOREFT, "last": 1})
    with pytest.raises(GraftError, match="GC141"):
        compiled.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
    assert compiled.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False, use_cache=False).shape == (
        1,
        5,
    )
    with pytest.raises(GraftError, match=r"GC050.*edits values between layers"):
        compiled.merge()


@pytest.mark.full
def test_artifact(tmp_path: Path) -> None:
    """An artifact computes the same."""
    compiled = adapted("llama", varied(ENDS, tied=False))
    compiled.save(tmp_path / "saved")
    inputs = batch_for(compiled, "llama")
    loaded = graftc.load(tmp_path / "saved", tiny("llama"))
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))


@pytest.mark.full
def test_quantised_base() -> None:
    """A base in 4 bits is edited in the same way as its own values."""
    entry = {"adapt": [LOREFT], "base": {"quantize": "nf4"}}
    compiled = graftc.compile(entry, tiny("llama"), seed=0).eval()
    inputs = inputs_for(compiled)
    adapted_outputs = outputs_of(compiled, inputs)
    with compiled.disabled():
        assert largest_difference(outputs_of(compiled, inputs), adapted_outputs) > 1e-3


@pytest.mark.full
@each_way
def test_published_count(count: Any) -> None:
    """LLaMA-7B, rank 8, tied positions of all 32 layers: 0.031 % of its parameters, as in the paper's table 1."""
    sizes = {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32}
    report = count([{**ENDS, "rank": 8}], ("LlamaForCausalLM", "LlamaConfig", {**sizes, "vocab_size": 32000}))
    assert report.trainable_parameters == 32 * (2 * 8 * 4096 + 8) == 2_097_408
    assert round(100 * report.trainable_parameters / 6_738_415_616, 3) == 0.031
