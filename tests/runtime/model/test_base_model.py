"""The base model within a compiled one, which returns the last hidden state without the head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny
from graftc.testing.perturbing import perturb
from tests.kit.comparing import gradients_of
from tests.kit.models import adapted

LORA = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "ffn.up"]}}]}
IDS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])
PREFIXES = {"bert": "bert", "gpt2": "transformer", "llama": "model"}


def last(compiled: Any, **inputs: Any) -> torch.Tensor:
    with torch.no_grad():
        state: torch.Tensor = compiled(**inputs, output_hidden_states=True).hidden_states[-1]
    return state


@pytest.mark.full
@pytest.mark.parametrize("family", PREFIXES)
def test_it_is_the_last_hidden_state(family: str) -> None:
    compiled = adapted(family, **LORA)
    assert compiled.base_model is getattr(compiled, PREFIXES[family])
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    with torch.no_grad():
        hidden = compiled.base_model(input_ids=IDS, attention_mask=mask).last_hidden_state
    expected = last(compiled, input_ids=IDS, attention_mask=mask)
    assert torch.equal(hidden, expected)
    source = compiled.compilation.model.eval()
    with torch.no_grad(), compiled.disabled():
        own = getattr(source, PREFIXES[family])(input_ids=IDS, attention_mask=mask).last_hidden_state
        assert torch.allclose(compiled.base_model(input_ids=IDS, attention_mask=mask).last_hidden_state, own, atol=1e-6)


@pytest.mark.full
def test_the_head_is_left_out() -> None:
    """Nothing of the head runs and it gets no gradient, even if it is adapted."""
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": ["attn.q", "head"]}}]}
    compiled = graftc.compile(spec, tiny("llama"))
    perturb(compiled, 0.05)
    compiled.train()
    compiled.base_model(input_ids=IDS).last_hidden_state.square().sum().backward()
    got = {name for name, tensor in compiled.named_parameters() if tensor.grad is not None}
    assert got and not any(name.startswith("lm_head") for name in got)
    executables = compiled._graftc.shown.executables.items()
    (program,) = (each.program for key, each in executables if key.entry == "hidden")
    assert not any(str(node.target).startswith("lm_head") for node in program.graph.find_nodes(op="get_attr"))


@pytest.mark.full
def test_a_loss_of_ones_own_trains_as_the_models() -> None:
    """Head and loss by hand, as in trainers that split the vocabulary, give the same gradients."""
    compiled = adapted("llama", **LORA).train()
    compiled(input_ids=IDS, labels=IDS).loss.backward()
    expected = gradients_of(compiled)
    compiled.zero_grad()
    hidden = compiled.base_model(input_ids=IDS).last_hidden_state
    logits = hidden @ compiled.get_output_embeddings().weight.T
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), IDS[:, 1:].flatten()).backward()
    gradients = gradients_of(compiled)
    assert gradients.keys() == expected.keys()
    assert all(torch.allclose(gradients[n], g, rtol=1e-4, atol=1e-7) for n, g in expected.items())


@pytest.mark.full
def test_merged_models_and_copies_have_one_of_their_own() -> None:
    compiled = adapted("llama", **LORA)
    expected = last(compiled, input_ids=IDS)
    merged, copied = compiled.merge(), copy.deepcopy(compiled)
    with torch.no_grad():
        assert torch.allclose(merged.base_model(input_ids=IDS).last_hidden_state, expected, atol=1e-5)
        for tensor in copied.adapter_state_dict().values():
            tensor.zero_()
        assert torch.equal(compiled.base_model(input_ids=IDS).last_hidden_state, expected)
        assert not torch.allclose(copied.base_model(input_ids=IDS).last_hidden_state, expected)


def test_a_model_without_a_head_is_its_own() -> None:
    class Plain(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = torch.nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.linear(x)
            return output

    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "linear"}}]}
    compiled = graftc.compile(spec, Plain(), {"x": torch.ones(2, 4)})
    assert compiled.base_model is compiled


@pytest.mark.slow
def test_wrong_inputs_are_told_as_by_the_model() -> None:
    with pytest.raises(GraftError) as error:
        adapted("llama", **LORA).base_model(inputs=IDS)
    assert error.value.code == "GC031"


@pytest.mark.full
@pytest.mark.slow
def test_rows_choose_from_a_bank() -> None:
    target = {"role": ["attn.q", "attn.v"]}
    adapt = [{"method": "lora", "rank": 2, "name": name, "target": target} for name in ("a", "b")]
    compiled = adapted("llama", **{"adapt": adapt, "compose": {"bank": ["a", "b"]}})
    ids = ["a", "b"]
    with torch.no_grad():
        mixed = compiled.base_model(input_ids=IDS, adapter_ids=ids).last_hidden_state
        other = compiled.base_model(input_ids=IDS, adapter_ids=["b", "b"]).last_hidden_state
    assert torch.equal(mixed, last(compiled, input_ids=IDS, adapter_ids=ids))
    assert not torch.allclose(mixed[0], other[0]) and torch.equal(mixed[1], other[1])
