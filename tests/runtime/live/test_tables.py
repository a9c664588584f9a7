"""Tables that layers pass to each other: keys and values that later layers of Gemma 4 share."""

from __future__ import annotations

import copy
from collections import UserDict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import graftc
from graftc.specs.document import Spec
from graftc.testing import perturb
from tests.runtime.live.models import forced_apart, texts

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.up"}}]}
ATTENTION: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{q_proj,v_proj}"}}]}


def gemma4() -> nn.Module:
    """A model in which layers 2 and 3 attend to the keys and values of layers 0 and 1."""
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    sizes: dict[str, Any] = {
        "vocab_size": 100,
        "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 8,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
        "max_position_embeddings": 128,
    }
    torch.manual_seed(0)
    return Gemma4ForCausalLM(Gemma4TextConfig(**sizes)).eval()


@pytest.mark.full
def test_layers_share_keys_and_values_as_the_source_does() -> None:
    model = gemma4()
    first, second = texts([((), 9), ((), 5)], 0), texts([((), 4), ((), 12), ((), 7)], 1)
    compiled = forced_apart(Spec.model_validate(ATTENTION), model, first)
    assert {stack.level for stack in compiled.report.stacks} == {"layers"}
    for training in (False, True):
        compiled.train(training), model.train(training)
        for batch in (first, second):
            with torch.no_grad():
                ours, theirs = compiled(**batch), model(**batch)
            assert torch.equal(ours.logits, theirs.logits) and torch.equal(ours.loss, theirs.loss)
    compiled.eval(), model.eval()
    perturb(compiled)
    folded = compiled.merge()
    plain = copy.deepcopy(model)
    plain.load_state_dict(folded.state_dict(), strict=False)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**second).logits, plain(**second).logits, rtol=1e-5, atol=1e-5)
    compiled(**second).loss.backward()
    shared = [p.grad for name, p in compiled.named_parameters() if "layers.0.self_attn.v_proj" in name and ".B" in name]
    assert shared and all(g is not None and float(g.abs().max()) > 0 for g in shared)
    options = {"max_new_tokens": 6, "do_sample": False}
    prompt = {name: second[name] for name in ("input_ids", "attention_mask")}
    for cached, tokens in ((True, 6), (False, 2)):  # without a cache, each length is one more kind of call
        asked = {**prompt, **options, "max_new_tokens": tokens, "use_cache": cached}
        assert torch.equal(compiled.generate(**asked), plain.generate(**asked))


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(6, 6)

    def forward(self, x: Tensor, seen: UserDict[str, Tensor]) -> Tensor:
        y: Tensor = x + torch.tanh(self.up(x))
        if "first" in seen:
            y = y + seen["first"]
        else:
            seen["first"] = y
        return y


class Removing(Layer):
    def forward(self, x: Tensor, seen: UserDict[str, Tensor]) -> Tensor:
        y = super().forward(x, seen)
        seen.pop("given", None)
        return y


class Model(nn.Module):
    """A model that is not a graph, because it reads a value."""

    def __init__(self, layer: type[Layer]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer() for _ in range(3))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        seen: UserDict[str, Tensor] = UserDict({"given": x})
        if float(x.mean()) > 1e6:
            x = -x
        for layer in self.layers:
            x = layer(x, seen)
        return x, seen["first"]


@pytest.mark.slow
def test_what_a_layer_puts_into_a_table_is_in_the_callers_own() -> None:
    model, x = Model(Layer), torch.randn(4, 6)
    compiled = graftc.compile(SPEC, model, (x,), cache=False)
    assert [stack.level for stack in compiled.report.stacks] == ["layers"]
    other = torch.randn(2, 6)
    for ours, theirs in zip(compiled(other), model(other), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.slow
def test_a_layer_that_takes_something_out_is_its_own_python() -> None:
    model, x = Model(Removing), torch.randn(4, 6)
    compiled = graftc.compile(SPEC, model, (x,), cache=False)
    (stack,) = compiled.report.stacks
    assert stack.level == "modules" and "removes an entry from a table" in stack.reason
    assert torch.equal(compiled(x)[0], model(x)[0])
    with pytest.raises(graftc.GraftError, match="removes an entry from a table"):
        graftc.compile({**SPEC, "capture": "layers"}, model, (x,), cache=False)
