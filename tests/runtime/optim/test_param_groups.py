"""`graftc.optim.param_groups`: every tensor once, at the rate and with the decay of its kind."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from tests.kit.releases import needs
from tests.parity.support import Names

LORA = {"name": "low", "method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 2}


def settings_of(groups: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """Return learning rates and decays by name; check that no tensor is in two groups."""
    settings = [(name, (g["lr"], g["weight_decay"])) for g in groups for name in g["names"]]
    assert len(settings) == len(dict(settings))
    return dict(settings)


def rates_of(compiled: Any, **options: Any) -> dict[str, float]:
    """Return learning rates by name, for a rate of 1."""
    return {name: rate for name, (rate, _) in settings_of(graftc.optim.param_groups(compiled, 1.0, **options)).items()}


PARTS = {"A": "lora_A.default.weight", "B": "lora_B.default.weight", "m": "lora_magnitude_vector.default.weight"}
TABLE = {"A": "lora_embedding_A.default", "B": "lora_embedding_B.default"}


def peft_name(name: str) -> str:
    """Return peft's name of a tensor: a factor, a bias trained in place, or a tensor of a head's copy."""
    if name.endswith(".bias") and "classifier" not in name:
        return Names({"bias": "base_layer.bias"}).of(name)
    if "classifier" in name:
        return Names({part: f"modules_to_save.default.{part}" for part in ("weight", "bias")}).of(name)
    return Names({**PARTS, **(TABLE if "embeddings" in name else {})}).of(name)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_lora_plus_is_that_of_peft(method: str) -> None:
    """The groups have the same tensors at the same rates, with an embedding, biases and a head.

    Magnitudes of DoRA, which are scales, do not decay here; in peft they do, which pulls them to zero and not to the
    base.
    """
    peft = pytest.importorskip("peft")
    judge = pytest.importorskip("peft.optimizers").create_loraplus_optimizer
    if method == "lora":
        needs("peft", "0.21", "earlier ones take the factors of tables for those of other maps in LoRA+")
    base = tiny("bert")
    names = ["query", "value", "word_embeddings"] if method == "lora" else ["query", "value"]
    biases = "lora_only" if method == "lora" else "none"
    entry = {"method": method, "target": {"modules": [f"**.{name}" for name in names]}, "rank": 2}
    entry |= {"bias": biases} if method == "lora" else {}
    ours = graftc.compile({"adapt": [entry], "train": ["classifier"]}, copy.deepcopy(base))
    config = peft.LoraConfig(
        r=2, target_modules=names, modules_to_save=["classifier"], bias=biases, use_dora=method == "dora"
    )
    theirs = peft.get_peft_model(base, config)
    judged = judge(theirs, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16, loraplus_weight_decay=0.1)
    named = {id(p): name for name, p in theirs.named_parameters()}

    def plain(groups: Any, name: Any) -> set[tuple[Any, ...]]:
        members: dict[tuple[float, float], set[str]] = {}
        for group in groups:
            for each in map(name, group["params"]):
                decay = 0.0 if "magnitude" in each else group["weight_decay"]
                members.setdefault((group["lr"], decay), set()).add(each)
        return {(*key, frozenset(names)) for key, names in members.items()}

    mine = {id(p): peft_name(name) for name, p in ours.named_parameters() if p.requires_grad}
    groups = graftc.optim.param_groups(ours, 1e-3, lr_ratio=16, weight_decay=0.1)
    optimizer = torch.optim.AdamW(groups)
    assert plain(optimizer.param_groups, lambda p: mine[id(p)]) == plain(judged.param_groups, lambda p: named[id(p)])
    assert len(groups) == (4 if method == "lora" else 3)


METHODS: dict[str, tuple[Mapping[str, Any], set[str]]] = {
    "houlsby": ({}, {"down", "up"}),
    "unipelt": ({}, {"vectors", "hidden", "A", "B", "keys_out", "values_out", "down", "up"}),
    "adamix": ({}, {"down", "up"}),
    "mask": ({"density": 0.01}, {"weight_delta"}),
    "diff_pruning": ({"density": 0.01}, {"weight_w"}),
    "bitfit": ({}, set()),
    "norms": ({}, set()),
    "prefix": ({}, {"keys", "values"}),
    "full": ({"target": {"role": ["attn.q", "norm"]}}, {"weight"}),
}


@pytest.mark.full
@pytest.mark.parametrize("method", METHODS)
def test_what_decays(method: str) -> None:
    """Matrices, prompts and entries of matrices decay; biases, norms, scales and gates do not.

    Every trained tensor is in one group.
    """
    fields, decays = METHODS[method]
    compiled = graftc.compile({"adapt": [{"method": method, **fields}]}, tiny("gpt2"))
    settings = settings_of(graftc.optim.param_groups(compiled, 1e-3, weight_decay=0.1))
    assert set(settings) == {name for name, p in compiled.named_parameters() if p.requires_grad}
    assert {name.rpartition(".")[2] for name, (_, decay) in settings.items() if decay} == decays
    norms = [decay for name, (_, decay) in settings.items() if ".ln_" in name]
    assert not any(norms) and bool(norms) == (method in ("norms", "full", "diff_pruning", "mask", "bitfit"))


PFEIFFER = [{"name": name, "method": "pfeiffer"} for name in ("one", "two")]
TWO = [{**LORA, "name": name} for name in ("one", "two")]
SPECS: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "fuse": ("bert", {"adapt": PFEIFFER, "compose": {"fuse": ["one", "two"], "train": "all"}}, {"bias"}),
    "gate": ("bert", {"adapt": [*PFEIFFER, LORA], "compose": {"gate": ["one", "two", "low"]}}, {"bias", "gate"}),
    "bank": ("bert", {"adapt": TWO, "compose": {"bank": ["one", "two"]}}, set()),
    "tokens": ("gpt2", {"adapt": [LORA], "tokens": {"add": ["<x>"]}}, set()),
    "untie": ("gpt2", {"adapt": [{**LORA, "target": {"role": "head"}}], "untie": ["lm_head"]}, set()),
}


@pytest.mark.full
@pytest.mark.parametrize("case", SPECS)
def test_compositions_and_what_else_a_spec_has(case: str) -> None:
    """Every trained tensor is in one group, and gates are vectors, wherever they come from."""
    family, spec, vectors = SPECS[case]
    compiled = graftc.compile(spec, tiny(family))
    settings = settings_of(graftc.optim.param_groups(compiled, 1e-3, weight_decay=0.1))
    assert set(settings) == {name for name, p in compiled.named_parameters() if p.requires_grad}
    still = {name.rpartition(".")[2].rpartition("_")[2] for name, (_, decay) in settings.items() if not decay}
    assert still == vectors


@pytest.mark.full
def test_layers() -> None:
    """As in BEiT, the last layer has ``d``, the first ``d^L``, the embeddings before it ``d^(L+1)``, and the rest 1."""
    spec = {"adapt": [LORA], "train": ["transformer.wpe", "transformer.ln_f", "transformer.h.1.ln_1"]}
    rates = rates_of(graftc.compile(spec, tiny("gpt2", n_layer=3)), layer_decay=0.5)
    for name, rate in rates.items():
        wanted = {"h.0": 0.125, "h.1": 0.25, "h.2": 0.5, "wpe": 0.0625, "ln_f": 1.0}
        (expected,) = [r for place, r in wanted.items() if f".{place}." in name]
        assert rate == expected, name
    assert set(rates.values()) == {0.125, 0.25, 0.5, 0.0625, 1.0}


@pytest.mark.full
def test_an_encoder_and_a_decoder() -> None:
    """Each stack counts its own layers; the shared embedding is one step below the first layer of the decoder."""
    spec = {"adapt": [{**LORA, "target": {"role": ["attn.q", "decoder.cross.attn.q", "embed"]}}]}
    with pytest.warns(graftc.GraftWarning, match="GC024"):
        compiled = graftc.compile(spec, tiny("t5", num_decoder_layers=3))
    by_name = rates_of(compiled, layer_decay=0.5)
    for stack, layers in {"encoder": 2, "decoder": 3}.items():
        for layer in range(layers):
            rates = {r for name, r in by_name.items() if f"{stack}.block.{layer}." in name}
            assert rates == {0.5 ** (layers - layer)}, (stack, layer)
    assert {r for name, r in by_name.items() if "block" not in name} == {0.5**4}


class Small(nn.Module):
    """A model of numbered layers without residual branches, between two linear maps."""

    def __init__(self) -> None:
        super().__init__()
        self.read = nn.Linear(4, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 6) for _ in range(2)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, 4]`` to ``[batch, 3]``."""
        x = self.read(x)
        for layer in self.layers:
            x = torch.relu(layer(x))
        return self.head(x)


def test_layers_without_residual_branches() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"modules": ["**"]}, "rank": 2}]}
    rates = rates_of(graftc.compile(spec, Small(), (torch.zeros(2, 4),)), layer_decay=0.5)
    by_module = {name.partition(".graftc.")[0]: rate for name, rate in rates.items()}
    assert by_module == {"read": 0.125, "layers.0": 0.25, "layers.1": 0.5, "head": 1.0}


@pytest.mark.slow
def test_overrides_and_frozen_tensors() -> None:
    """An adaptation's own numbers replace the common ones; options of the optimiser pass through."""
    other = {"name": "other", "method": "ia3"}
    compiled = graftc.compile({"adapt": [LORA, other], "train": ["transformer.ln_f"]}, tiny("gpt2"))
    overrides = {"other": {"lr": 0.5, "betas": (0.8, 0.9)}, "trained": {"lr": 0.25, "lr_ratio": None}}
    groups = graftc.optim.param_groups(compiled, 1.0, lr_ratio=2.0, weight_decay=0.1, overrides=overrides)
    owners = {name.partition(".graftc.")[2].partition(".")[0]: g for g in groups for name in g["names"]}
    assert owners["other"]["lr"] == 1.0 and owners["other"]["betas"] == (0.8, 0.9)  # twice 0.5: scales go with B
    assert owners["trained"]["lr"] == 0.25 and "betas" not in owners["trained"]
    optimizer = torch.optim.AdamW(groups)
    assert sorted({g["betas"] for g in optimizer.param_groups}) == [(0.8, 0.9), (0.9, 0.999)]
    compiled.train_only("other")
    assert all(".graftc.other." in name for name in rates_of(compiled))


@pytest.mark.full
def test_they_train_in_the_trainer(tmp_path: Any) -> None:
    """The Trainer's own schedule multiplies the rate of each group."""
    from transformers import Trainer, TrainingArguments

    compiled = graftc.compile({"adapt": [LORA]}, tiny("gpt2"))
    groups = graftc.optim.param_groups(compiled, 1e-2, lr_ratio=16.0)
    example = {"input_ids": torch.arange(8), "labels": torch.arange(8)}
    settings = TrainingArguments(str(tmp_path), max_steps=2, report_to=[], use_cpu=True, save_strategy="no")
    optimizer = (torch.optim.AdamW, {"params": groups})
    trainer = Trainer(compiled, settings, train_dataset=[example] * 8, optimizer_cls_and_kwargs=optimizer)
    before = compiled.adapter_state_dict()
    start = {name: tensor.clone() for name, tensor in before.items()}
    trainer.train()
    assert [g["initial_lr"] for g in trainer.optimizer.param_groups] == [1e-2, 0.16]
    assert all(not torch.equal(start[name], tensor) for name, tensor in compiled.adapter_state_dict().items())


@pytest.mark.slow
@pytest.mark.sample("options0-GC073", "options2-GC073", "options3-GC073", "options5-GC091", "options7-GC073")
@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"lr": -1.0}, "GC073"),
        ({"weight_decay": float("nan")}, "GC073"),
        ({"lr_ratio": "16"}, "GC073"),
        ({"layer_decay": 0.0}, "GC073"),
        ({"layer_decay": 1.5}, "GC073"),
        ({"overrides": {"lwo": {"lr": 1.0}}}, "GC091"),
        ({"overrides": {"low": {"lr": True}}}, "GC073"),
        ({"overrides": [("low", {})]}, "GC073"),
    ],
)
def test_wrong_numbers(options: dict[str, Any], code: str) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, tiny("gpt2"))
    with pytest.raises(GraftError) as caught:
        graftc.optim.param_groups(compiled, **{"lr": 1e-3, **options})
    assert caught.value.code == code
