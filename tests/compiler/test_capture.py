"""Capturing: both modes agree, the model is not changed, and the cache returns the same graph."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import graftc
from graftc.compiler.capture import capture_cache
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.defaults import default_axes
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.printer import format_program, structural_hash
from graftc.passes.core.ir.verify import record_baseline, verify
from graftc.passes.core.sites.sites import linear_use
from graftc.passes.core.weights.store import Store
from graftc.testing import families


@pytest.mark.full
@pytest.mark.parametrize("family", families.FAMILIES)
def test_derived_eval_is_a_direct_eval_capture(family: str) -> None:
    model = getattr(families, family)()
    derived = to_eval(capture(CaptureRequest.of(model)).program)
    direct = capture(CaptureRequest.of(model, mode="eval")).program
    assert structural_hash(derived) == structural_hash(direct)
    assert format_program(derived) == format_program(direct)


class Counting(nn.Module):
    """Batch normalisation and several dropouts: everything that depends on the mode."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(6)
        self.linear = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.linear(self.drop(self.norm(x))))


@pytest.mark.slow
def test_batch_norm_and_dropout_in_both_modes() -> None:
    axes = [Axis("x", torch.float32, ("batch", 6))]
    model = Counting()
    derived = to_eval(capture(CaptureRequest.of(model, axes)).program)
    assert structural_hash(derived) == structural_hash(capture(CaptureRequest.of(model, axes, mode="eval")).program)
    spec = {"adapt": [{"method": "lora", "target": {"modules": "linear"}, "rank": 2}]}
    adapted = graftc.compile(spec, model, {"x": torch.zeros(2, 6)})
    x = torch.randn(16, 6)
    adapted.eval()
    with torch.no_grad():
        assert torch.equal(adapted(x), model.eval()(x))


@pytest.mark.full
def test_the_cache_gives_back_the_same_graph(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    model = families.llama()
    axes = default_axes(model)
    assert capture_cache.lookup(CaptureRequest.of(model, axes)) is None
    first = capture(CaptureRequest.of(model, axes))
    capture_cache.keep(CaptureRequest.of(model, axes), first)
    again = capture_cache.lookup(CaptureRequest.of(model, axes))
    assert again is not None and again.cached
    assert format_program(again.program) == format_program(first.program)
    assert structural_hash(again.program) == structural_hash(first.program)
    verify(record_baseline(again.program), Store.mirror(model), "cache", types=True)


@pytest.mark.parametrize(
    "change",
    [{"hidden_dropout_prob": 0.2}, {"num_hidden_layers": 3}, {"hidden_act": "relu"}, {"attn_implementation": "eager"}],
)
def test_the_key_tells_models_apart(change: dict[str, Any]) -> None:
    model, other = families.bert(), families.bert(**change)
    assert capture_cache.key(CaptureRequest.of(model)) != capture_cache.key(CaptureRequest.of(other))


def test_a_module_changed_by_hand_has_another_key() -> None:
    model, other = families.bert(), families.bert()
    other.bert.encoder.layer[0].output.dropout.p = 0.7
    assert capture_cache.key(CaptureRequest.of(model)) != capture_cache.key(CaptureRequest.of(other))


@pytest.mark.full
def test_a_broken_cache_entry_is_captured_again(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path))
    model = families.bert()
    axes = default_axes(model)
    capture_cache.keep(CaptureRequest.of(model, axes), capture(CaptureRequest.of(model, axes)))
    (entry,) = tmp_path.glob("*.json")
    entry.write_text(entry.read_text()[:-100])
    assert capture_cache.lookup(CaptureRequest.of(model, axes)) is None
    data = {"program": {"schema": 2, "types": [], "nodes": [{"op": "call_function"}]}, "constants": {}}
    entry.write_text(json.dumps(data))
    assert capture_cache.lookup(CaptureRequest.of(model, axes)) is None


@pytest.mark.full
def test_the_cache_can_be_switched_off(monkeypatch: Any) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", "off")
    model = families.bert()
    assert capture_cache.folder() is None
    capture_cache.keep(CaptureRequest.of(model), capture(CaptureRequest.of(model)))
    assert capture_cache.lookup(CaptureRequest.of(model)) is None


class Skipping(nn.Module):
    """A model with a layer that may be skipped at random in training."""

    def __init__(self) -> None:
        super().__init__()
        self.layerdrop = 0.5
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.layerdrop > 0 and float(torch.rand(1)) < self.layerdrop:
            return x
        return self.linear(x)


def test_layerdrop_is_off_while_capturing_and_reported() -> None:
    model = Skipping()
    spec = {"adapt": [{"method": "lora", "target": {"modules": "linear"}, "rank": 2}]}
    adapted = graftc.compile(spec, model, {"x": torch.zeros(2, 4)})
    assert model.layerdrop == 0.5
    assert any("layerdrop" in note for note in adapted.report.notes)


@pytest.mark.full
def test_stochastic_depth_is_gone_in_eval_mode() -> None:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(
        image_size=16, patch_size=4, embed_dim=8, depths=[2], num_heads=[2], window_size=2, drop_path_rate=0.5
    )
    model = SwinForImageClassification(config).eval()
    program = capture(CaptureRequest.of(model)).program
    assert "aten.rand(" in format_program(program)
    derived = to_eval(program)
    assert "aten.rand(" not in format_program(derived)
    assert structural_hash(derived) == structural_hash(capture(CaptureRequest.of(model, mode="eval")).program)


def test_what_is_joined_and_cut_again_is_its_parts() -> None:
    """Biases that are concatenated and split again at the same places belong to their linear maps."""

    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            a, b = torch.cat((self.first.bias, self.second.bias)).chunk(2)
            return F.linear(x, self.first.weight, a) * F.linear(x, self.second.weight, b)

    program = capture(CaptureRequest.of(Joined(), [Axis("x", torch.float32, ("batch", 6))])).program
    uses = [
        linear_use(node) for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default)
    ]
    assert [use.bias and use.bias.tensor for use in uses if use is not None] == ["first.bias", "second.bias"]
    assert not program.graph.find_nodes(op="call_function", target=torch.ops.aten.cat.default)


class Counted(nn.Module):
    """A map whose forward makes the same number into a tensor twice, and another one."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        first, second, other = torch.tensor(2.0), torch.tensor(2.0), torch.tensor(3.0)
        return self.inner(x * first) * second + other


def test_equal_constants_of_a_module_are_one_node() -> None:
    result = capture(CaptureRequest.of(Counted(), [Axis("x", torch.float32, ("batch", 6))]))
    read = [str(node.target) for node in result.program.graph.find_nodes(op="get_attr")]
    assert len(read) == len(set(read)) == 4 and {*result.constants} == {name for name in read if "constant" in name}
    assert sorted(float(value) for value in result.constants.values()) == [2.0, 3.0]


class Branching(nn.Module):
    """A model with a child that leaves a choice by value in the graph."""

    class Choice(nn.Module):
        """One of two functions, chosen by the sum of the input."""

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Apply it to a tensor of any shape."""
            chosen: torch.Tensor = torch.cond(x.sum() > 0, torch.sin, torch.cos, (x,))
            return chosen

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), self.Choice()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map ``[batch, 4]`` to the same shape."""
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.mark.slow
def test_an_operator_that_holds_code_is_in_no_graph_and_what_is_beside_it_is() -> None:
    """The module that calls it is named, and runs unchanged between graphs of maps."""
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "layers.0"}}]}
    named = r"GC030: .* layers\.1 \(Choice\) calls cond"
    model, batches = Branching(), (torch.randn(3, 4), -torch.randn(5, 4))
    with pytest.raises(graftc.GraftError, match=named) as error:
        graftc.compile({**spec, "capture": "graph"}, model, batches[:1], cache=False)
    assert error.value.hint
    compiled = graftc.compile(spec, model, batches[:1], cache=False)
    assert "layers.1 (Choice) calls cond" in compiled.compilation.notes[0]
    assert all(torch.equal(compiled(x), model(x)) for x in batches)


@pytest.mark.full
def test_gemma_3_is_taken_apart_with_images_and_one_graph_without() -> None:
    """The mask for image tokens is a function mapped over its indices; text alone has another mask."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration, Gemma3TextConfig, SiglipVisionConfig

    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = Gemma3TextConfig(vocab_size=300, num_key_value_heads=1, head_dim=8, sliding_window=16, **small)
    vision = SiglipVisionConfig(image_size=28, patch_size=7, **small)
    both = {"text_config": text.to_dict(), "vision_config": vision.to_dict()}
    config = Gemma3Config(**both, mm_tokens_per_image=4, image_token_index=299)
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = torch.randint(0, 290, (2, 12))
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
    words = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    compiled = graftc.compile(spec, model, words, cache=False).eval()
    assert torch.equal(compiled(**words).logits, model(**words).logits)
    shown = {**words, "input_ids": ids.clone(), "pixel_values": torch.randn(2, 3, 28, 28)}
    shown["input_ids"][:, 1:5] = 299
    shown["token_type_ids"] = (shown["input_ids"] == 299).long()
    with pytest.raises(graftc.GraftError, match=r"GC030: .* model \(Gemma3Model\) calls "):
        graftc.compile({**spec, "capture": "graph"}, model, shown, cache=False)
    taken_apart = graftc.compile(spec, model, shown, cache=False).eval()
    assert {stack.level for stack in taken_apart.report.stacks} == {"layers"}
    assert torch.equal(taken_apart(**shown).logits, model(**shown).logits)
