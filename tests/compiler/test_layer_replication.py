"""Deeper models of replicated layers, beside peft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import largest_difference, outputs_of, perturb, same_bits, tiny
from graftc.testing.compare import inputs_for
from tests.kit.models import adapted

RANGES = [[0, 2], [0, 1], [1, 2]]
LORA = {"method": "lora", "rank": 4, "alpha": 6, "target": {"role": ["attn.q", "ffn.down"]}}


def deeper(model: nn.Module, **spec: Any) -> Any:
    """Return a model of four layers, made of two, with a LoRA of random values in each."""
    return adapted(model, LORA, layer_replication=RANGES, **spec)


@pytest.mark.slow
def test_it_computes_what_peft_computes(tmp_path: Path) -> None:
    """A folder of either side is read by the other; outputs, gradients and generated texts are equal."""
    peft = pytest.importorskip("peft")
    source: Any = tiny("llama")
    compiled = deeper(source)
    assert len(source.model.layers) == source.config.num_hidden_layers == 2
    inputs = inputs_for(compiled)
    compiled.export(tmp_path / "ours", format="peft")
    theirs = peft.PeftModel.from_pretrained(tiny("llama"), tmp_path / "ours", is_trainable=True).eval()
    assert largest_difference(outputs_of(compiled, inputs), outputs_of(theirs, inputs)) <= 1e-5
    prompt = {"input_ids": inputs["input_ids"][:1, :4], "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(compiled.generate(**prompt), theirs.generate(**prompt))
    for model in (compiled, theirs):
        model(**inputs).logits.square().sum().backward()
    gradients = dict(theirs.named_parameters())
    for name, parameter in compiled.named_parameters():
        if parameter.requires_grad:
            module, _, part = name.partition(".graftc.lora.")
            other = gradients[f"base_model.model.{module}.lora_{part}.default.weight"].grad
            torch.testing.assert_close(parameter.grad, other, rtol=1e-4, atol=1e-4)
    theirs.save_pretrained(tmp_path / "theirs")
    imported = graftc.import_peft(tmp_path / "theirs", tiny("llama")).eval()
    assert largest_difference(outputs_of(imported, inputs), outputs_of(theirs, inputs)) <= 1e-5
    assert [list(each) for each in imported.spec.layer_replication] == RANGES


@pytest.mark.slow
def test_a_config_of_peft_is_a_spec() -> None:
    """``graftc.compile`` takes a config with `layer_replication`, and trains as many parameters as peft."""
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], layer_replication=[(0, 2), (0, 1), (1, 2)])
    compiled = graftc.compile(config, tiny("llama"))
    theirs = peft.get_peft_model(tiny("llama"), config)
    assert [list(each) for each in compiled.spec.layer_replication] == RANGES
    assert compiled.report.trainable_parameters == theirs.get_nb_trainable_parameters()[0]


@pytest.mark.full
def test_one_warning_names_the_copies() -> None:
    """All weights of copied layers are shared, so one of them is named; another tie, as of a head, has its own."""
    adaptation = {**LORA, "target": {"modules": ["**.q_proj", "**.down_proj", "lm_head"]}}
    with pytest.warns(graftc.GraftWarning) as told:
        adapted(tiny("llama", tie_word_embeddings=True), adaptation, layer_replication=RANGES)
    messages = [str(each.message) for each in told if "GC024" in str(each.message)]
    assert len(messages) == 2
    assert "copies of layers share model.layers.0.self_attn.q_proj.weight" in messages[0]
    assert "lm_head.weight is tied to model.embed_tokens.weight" in messages[1]


@pytest.mark.sample("True-**")
@pytest.mark.slow
@pytest.mark.parametrize("untied", ["**", "self_attn.q_proj"])
@pytest.mark.parametrize("tied_head", [False, True])
def test_it_merges_once_the_copies_are_untied(tied_head: bool, untied: str, tmp_path: Path) -> None:
    """Layers that share a weight cannot both fold into it; untied ones do, and the saved model has all of them.

    Copies may keep sharing weights that nothing folds into, and a head its table.
    """
    from transformers import AutoModelForCausalLM

    source: Any = tiny("llama", tie_word_embeddings=tied_head)
    queries = {**LORA, "target": {"role": "attn.q"}}
    with pytest.raises(GraftError, match=r"GC022.*which is tied to model\.layers\.2"):
        adapted(source, queries, layer_replication=RANGES).merge()
    compiled = adapted(source, queries, layer_replication=RANGES, untie=[f"model.layers.{{2,3}}.{untied}"])
    merged = compiled.merge()
    inputs = inputs_for(compiled)
    assert merged.certificate.passed
    merged.save(tmp_path / "merged")
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    loaded.eval()
    assert loaded.config.num_hidden_layers == 4 and loaded.config.tie_word_embeddings is tied_head
    assert largest_difference(outputs_of(loaded, inputs), outputs_of(compiled, inputs)) <= 1e-5


@pytest.mark.full
@pytest.mark.parametrize("family", ["bert", "gpt2", "gpt_neox", "mixtral", "vit"])
def test_an_artifact_has_all_layers(family: str, tmp_path: Path) -> None:
    """Other families have stacks of their own, and an artifact is loaded over the model as it was."""
    target = {"role": ["attn.q", "attn.v"]}
    compiled = adapted(family, {**LORA, "target": target}, layer_replication=RANGES)
    inputs = inputs_for(compiled)
    compiled.save(tmp_path / "saved")
    loaded = graftc.load(tmp_path / "saved", tiny(family))
    assert same_bits(outputs_of(loaded, inputs), outputs_of(compiled, inputs))
    with compiled.disabled():
        assert largest_difference(outputs_of(compiled, inputs), outputs_of(tiny(family), inputs)) > 1e-3


@pytest.mark.slow
def test_the_same_layers_are_the_same_model() -> None:
    """One range of all layers changes nothing."""
    model = tiny("llama")
    compiled = graftc.compile({"adapt": [LORA], "layer_replication": [[0, 2]]}, model).eval()
    inputs = inputs_for(compiled)
    assert same_bits(outputs_of(compiled, inputs), outputs_of(model, inputs))


@pytest.mark.parametrize(
    ("family", "ranges", "message"),
    [
        ("llama", [[0, 3]], r"GC002.*\[0, 3\] is not a range of the 2 layers of model\.layers"),
        ("llama", [[1, 1]], r"GC002.*\[1, 1\] is not a range"),
        ("llama", [[0]], r"GC002.*layer_replication\[0\]"),
        ("llama", [[0, 2]] * 513, r"GC009.*1,026 layers"),
        ("t5", [[0, 2]], r"GC034.*2 stacks of layers"),
    ],
)
def test_refusals(family: str, ranges: list[list[int]], message: str) -> None:
    with pytest.raises(GraftError) as error:
        graftc.compile({"adapt": [LORA], "layer_replication": ranges}, tiny(family))
    assert error.match(message.replace(".*", r"(?s:.*)"))


@pytest.mark.slow
def test_what_peft_cannot_say(tmp_path: Path) -> None:
    """Other types of peft have no such field, and an adapter of a deeper model is imported alone."""
    compiled = adapted("llama", {"method": "vera", "rank": 4, "target": LORA["target"]}, layer_replication=RANGES)
    with pytest.raises(GraftError, match=r"GC115.*layer_replication together with vera"):
        compiled.export(tmp_path / "vera", format="peft")
    for name in ("one", "two"):
        compiled = deeper(tiny("llama"))
        perturb(compiled)
        compiled.export(tmp_path / name, format="peft")
    with pytest.raises(GraftError, match=r"GC112.*cannot be combined with others"):
        graftc.import_peft([tmp_path / "one", tmp_path / "two"], tiny("llama"))
