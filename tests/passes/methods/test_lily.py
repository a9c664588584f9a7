"""Lily: the contract, its formula, which sites share tensors, padding, parts of a model, and PEFT's files."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import DeploymentContract, MethodContract, largest_difference, outputs_of, perturb, same_bits
from graftc.testing.compare import inputs_for
from graftc.testing.families import tiny
from tests.kit.models import fresh
from tests.kit.releases import peft_config
from tests.kit.specs import varied
from tests.passes.methods.places import OTHERS, ROLES

LILY: dict[str, Any] = {"method": "lily", "target": {"role": ROLES}, "rank": 4, "stride_a": 2, "num_b": 3}


class TestLily(MethodContract):
    """Lily on layers; ``attn.q`` of GPT-2 is a range of rows, whose tensors the layers share."""

    cacheable = False
    adaptation: ClassVar[dict[str, Any]] = LILY
    families = ("gpt2",)


@pytest.mark.full
class TestEverywhere(TestLily):
    """Lily on the other families."""

    families = OTHERS


@pytest.mark.full
class TestRealTokens(MethodContract):
    """Routers that ignore padding, and an ``A`` for each site."""

    cacheable = False
    variant = True
    adaptation: ClassVar[dict[str, Any]] = {**LILY, "tokens": "real", "stride_a": 1, "scaling": 0.5}
    families = ("bert", "gpt2", "t5")


class TestDeployed(DeploymentContract):
    """Export and compilation of Lily."""

    adaptation: ClassVar[dict[str, Any]] = LILY
    families = ("llama",)


class Layers(nn.Module):
    """Five layers, each with two maps of one size and one of another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(6, 9), "down": nn.Linear(9, 6), "side": nn.Linear(6, 9)}) for _ in range(5)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return hidden values of the size of ``x: [batch, sequence, 6]``."""
        for layer in self.layers:
            x = x + layer["down"](torch.tanh(layer["up"](x)) * layer["side"](x))
        return x


SHARED: dict[str, Any] = {"method": "lily", "rank": 2, "stride_a": 3, "num_b": 4, "scaling": 0.7}


def stacked(**changes: Any) -> tuple[nn.Module, Any, Tensor]:
    torch.manual_seed(0)
    model, x = Layers().double().requires_grad_(False), torch.randn(3, 5, 6, dtype=torch.float64)
    target = {"modules": ["layers.*.up", "layers.*.down"]}
    compiled = graftc.compile(
        {"adapt": [varied(SHARED, target=target, **changes)]}, model, example_inputs={"x": x}
    ).eval()
    return model, compiled, x


@pytest.mark.slow
def test_formula() -> None:
    """Every site uses the ``A`` of its block, the ``B`` of its kind and its own router, averaged over the batch."""
    model, compiled, x = stacked()
    own = perturb(compiled, 0.5)
    kinds = {"up": (6, 9), "down": (9, 6)}

    def adapted(index: int, kind: str, value: Tensor) -> Tensor:
        layer: Any = model.get_submodule(f"layers.{index}.{kind}")
        prefix = f"{kind}.graftc.lily"
        a = own[f"layers.{index - index % 3}.{prefix}.A"]
        b = own[f"layers.0.{prefix}.B"].view(4, 2, kinds[kind][1])
        hidden = value @ a.T
        choice = (hidden @ own[f"layers.{index}.{prefix}.R"].T).softmax(-1).flatten(0, -2).mean(0)
        delta = hidden @ torch.einsum("e,eio->io", choice, b)
        outputs: Tensor = layer(value) + 0.7 * delta
        return outputs

    expected = x
    for index in range(5):
        inner = torch.tanh(adapted(index, "up", expected)) * model.get_submodule(f"layers.{index}.side")(expected)
        expected = expected + adapted(index, "down", inner)
    torch.testing.assert_close(compiled(x), expected, rtol=0, atol=1e-12)
    assert float((compiled(x) - model(x)).abs().max()) > 0.1


def test_which_sites_share() -> None:
    """Two blocks of five layers with a stride of 3, one ``B`` for each kind, and a router for each site."""
    _, compiled, _ = stacked()
    tensors = compiled.adapter_state_dict()
    names = sorted(name for name in tensors if not name.endswith(".R"))
    expected = [f"layers.{i}.{kind}.graftc.lily.A" for i in (0, 3) for kind in ("up", "down")]
    assert names == sorted([*expected, *(f"layers.0.{kind}.graftc.lily.B" for kind in ("up", "down"))])
    assert sum(name.endswith(".R") for name in tensors) == 10
    count = 2 * 2 * (6 + 9) + 4 * 2 * (9 + 6) + 10 * 4 * 2
    assert compiled.report.trainable_parameters == count == sum(t.numel() for t in tensors.values())


@pytest.mark.full
def test_start() -> None:
    """``B`` is zero; ``A`` and the routers are uniform within one over the square root of their columns."""
    tensors = fresh("bert", varied(LILY, rank=16, num_b=20)).adapter_state_dict()
    for name, tensor in tensors.items():
        bound, largest = tensor.shape[1] ** -0.5, float(tensor.abs().max())
        assert largest == 0 if name.endswith(".B") else 0.9 * bound < largest <= bound, name


@pytest.mark.full
def test_sites_of_both_stacks_share() -> None:
    """In T5, queries of the encoder, of self-attention and of cross-attention are of one kind, in the model's order."""
    names = list(fresh("t5", varied(LILY, target={"modules": "**.q"})).adapter_state_dict())
    first = "encoder.block.0.layer.0.SelfAttention.q"
    owners = [name.partition(".graftc")[0] for name in names if name.endswith(".A")]
    assert owners == [first, *(f"decoder.block.{i}.layer.0.SelfAttention.q" for i in (0, 1))]
    assert [name.partition(".graftc")[0] for name in names if name.endswith(".B")] == [first]


@pytest.mark.full
def test_parts_of_a_model() -> None:
    """A decoder on an encoder's outputs uses the tensors that it shares with the encoder, which its graph lacks."""
    compiled = fresh("t5", LILY)
    perturb(compiled, 0.3)
    inputs = inputs_for(compiled)
    whole = [compiled(**inputs).logits]
    encoded = compiled.get_encoder()(input_ids=inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
    rest = {name: value for name, value in inputs.items() if name != "input_ids"}
    assert largest_difference([compiled(encoder_outputs=encoded, **rest).logits], whole) <= 2e-5
    count = len(compiled.adapter_state_dict())
    assert count == len(fresh("t5", LILY).adapter_state_dict()), "no graph has created tensors of its own"


@pytest.mark.slow
@pytest.mark.sample("real")
@pytest.mark.parametrize("tokens", ["all", "real"])
def test_padding(tokens: str) -> None:
    """With ``real``, padding has no effect on a text alone; with ``all``, it has."""
    compiled = fresh("bert", varied(LILY, tokens=tokens))
    perturb(compiled, 0.5)
    ids = torch.randint(3, 90, (1, 7), generator=torch.Generator().manual_seed(0))
    padded = {
        "input_ids": torch.cat([ids, torch.zeros(1, 4, dtype=torch.int64)], 1),
        "attention_mask": torch.cat([torch.ones(1, 7, dtype=torch.int64), torch.zeros(1, 4, dtype=torch.int64)], 1),
    }
    alone = outputs_of(compiled, {"input_ids": ids, "attention_mask": torch.ones(1, 7, dtype=torch.int64)})
    difference = largest_difference(alone, outputs_of(compiled, padded))
    assert difference <= 1e-5 if tokens == "real" else difference > 1e-3


@pytest.mark.full
def test_rows_depend_on_one_another() -> None:
    """The routers average over the batch, so a row in a batch is not the row alone."""
    compiled = fresh("bert", LILY)
    perturb(compiled, 0.5)
    inputs = inputs_for(compiled, (2, 8))
    both = compiled(**inputs).logits[:1]
    alone = compiled(**{name: value[:1] for name, value in inputs.items()}).logits
    assert float((both - alone).abs().max()) > 1e-2


@pytest.mark.full
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_no_cache(family: str) -> None:
    """A call with a cache is refused, also where rows and tokens lie on one axis; texts are generated without one."""
    compiled = fresh(family, LILY)
    perturb(compiled, 0.3)
    ids = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))
    with pytest.raises(GraftError) as error:
        compiled.generate(ids, max_new_tokens=4, do_sample=False, use_cache=True)
    assert error.value.code == "GC141"
    text = compiled.generate(ids, max_new_tokens=4, do_sample=False, use_cache=False, pad_token_id=0)
    expected = ids
    for _ in range(4):
        expected = torch.cat([expected, compiled(input_ids=expected).logits[:, -1].argmax(-1, keepdim=True)], 1)
    assert torch.equal(text, expected[:, : text.shape[1]])


@pytest.mark.full
def test_refusals(tmp_path: Path) -> None:
    """It does not fold, and PEFT cannot express some sharings."""
    compiled = fresh("llama", LILY)
    with pytest.raises(GraftError, match="averages over the tokens of a batch") as error:
        compiled.merge()
    assert error.value.code == "GC050"
    with pytest.raises(GraftError, match="num_b"):
        fresh("llama", varied(LILY, num_b=1))
    cases = (
        ({"layers": [1], "role": "attn.q"}, {}, "GC115"),
        ({"modules": "**.c_proj"}, {}, "GC115"),
        ({"role": "attn.q"}, {"tokens": "real"}, "GC115"),
    )
    for number, (target, fields, code) in enumerate(cases):
        family = "gpt2" if "modules" in target else "llama"
        own = fresh(family, varied(LILY, target=target, **fields))
        if number == 0:
            own.export(tmp_path / "one", format="peft")  # one site: nothing to share
            continue
        with pytest.raises(GraftError) as error:
            own.export(tmp_path / str(number), format="peft")
        assert error.value.code == code


@pytest.mark.full
def test_artifact(tmp_path: Path) -> None:
    compiled = fresh("bert", LILY)
    perturb(compiled, 0.3)
    compiled.save(tmp_path / "kept")
    loaded, inputs = graftc.load(tmp_path / "kept", tiny("bert")), inputs_for(compiled)
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    other = {**inputs, "position_ids": torch.arange(9).expand(5, 9)}
    assert largest_difference(outputs_of(loaded, other), outputs_of(compiled, other)) == 0


def saved(folder: Path, targets: Any = ("q_proj", "down_proj"), stride: int = 2) -> Any:
    """Save a model of PEFT with perturbed tensors."""
    import peft

    targets = targets if isinstance(targets, str) else list(targets)
    config = peft_config("LilyConfig", r=4, stride_A=stride, num_B=3, target_modules=targets)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(tiny("llama"), config)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lily" in name:
            parameter.data.normal_(0, 0.2)
    model.save_pretrained(folder)
    return model.eval()


@pytest.mark.slow
def test_copies_in_a_file_must_agree(tmp_path: Path) -> None:
    """A file repeats a shared tensor for each module; one that is missing or different is refused."""
    pytest.importorskip("peft")
    saved(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    key = "base_model.model.model.layers.1.self_attn.q_proj.lily_B.weight"
    save_file({**tensors, key: tensors[key] + 1}, file)
    with pytest.raises(GraftError, match="'B' is shared") as error:
        graftc.import_peft(tmp_path, tiny("llama"))
    assert error.value.code == "GC113"
    save_file({name: t for name, t in tensors.items() if name != key}, file)
    with pytest.raises(GraftError, match="not in the file") as error:
        graftc.import_peft(tmp_path, tiny("llama"))
    assert error.value.code == "GC113"


@pytest.mark.full
def test_a_pattern_is_one_kind_in_peft(tmp_path: Path) -> None:
    """From a regular expression, PEFT makes one kind of all modules of one size.

    The import then has a ``B`` for each name, with equal values, and refuses an ``A`` that different names share.
    """
    pytest.importorskip("peft")
    theirs = saved(tmp_path / "one", r".*\.(q_proj|o_proj)", 1)
    ours = graftc.import_peft(tmp_path / "one", tiny("llama")).eval()
    assert sum(name.endswith(".B") for name in ours.adapter_state_dict()) == 2
    inputs = inputs_for(ours)
    assert largest_difference(outputs_of(ours, inputs), outputs_of(theirs, inputs)) <= 1e-5
    saved(tmp_path / "two", r".*\.(q_proj|o_proj)", 2)
    with pytest.raises(GraftError, match="2 tensors do not fit") as error:
        graftc.import_peft(tmp_path / "two", tiny("llama"))
    assert error.value.code == "GC113"


@pytest.mark.full
def test_layers_that_are_alike_share_as_well() -> None:
    """In a deeper model, whose layers are captured once, every layer has the tensors of its own block."""
    compiled = fresh(tiny("llama", layers=5), LILY)
    names = [name for name in compiled.adapter_state_dict() if ".q_proj." in name]
    owners = [int(name.split(".")[2]) for name in names if name.endswith(".A")]
    assert owners == [0, 2, 4] and sum(name.endswith(".R") for name in names) == 5
    perturb(compiled, 0.3)
    inputs, kept = inputs_for(compiled), compiled.adapter_state_dict()
    before = outputs_of(compiled, inputs)
    for index in (0, 2, 4):
        name = f"model.layers.{index}.self_attn.q_proj.graftc.lily.A"
        compiled.load_adapter_state_dict({**kept, name: kept[name] + 0.1})
        assert largest_difference(outputs_of(compiled, inputs), before) > 1e-4
