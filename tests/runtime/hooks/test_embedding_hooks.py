"""Hooks on the token embedding, with which training loops add noise to the embeddings."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.specs.errors.diagnostics import GraftError
from tests.kit.models import adapted
from tests.kit.specs import lora

IDS = torch.tensor([[5, 6, 7, 8]])


def tilt(module: Any, inputs: Any, output: Tensor) -> Tensor:
    return output * torch.linspace(0.5, 2, output.shape[-1])


@pytest.mark.slow
@pytest.mark.sample("llama")
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_a_hook_changes_embeddings_as_in_the_source(family: str) -> None:
    compiled = adapted(family, lora(["attn.q"]), noise=0.1)
    source = compiled.compilation.model.eval()
    with torch.no_grad():
        before = compiled(input_ids=IDS).logits
        handles = [m.get_input_embeddings().register_forward_hook(tilt) for m in (compiled, source)]
        with compiled.disabled():
            assert torch.equal(compiled(input_ids=IDS).logits, source(input_ids=IDS).logits)
        after = compiled(input_ids=IDS).logits
        assert not torch.allclose(after, before, atol=1e-2)
        assert torch.equal(copy.deepcopy(compiled)(input_ids=IDS).logits, after)
        mask = torch.ones_like(IDS)  # a graph that is made with the hook in place
        assert torch.allclose(compiled(input_ids=IDS, attention_mask=mask).logits, after, atol=1e-5)
        run = torch.compile(compiled, backend="eager")
        assert torch.allclose(run(input_ids=IDS).logits, after, atol=1e-6)
        for handle in handles:
            handle.remove()
        assert torch.equal(compiled(input_ids=IDS).logits, before)


@pytest.mark.slow
def test_it_sees_adaptations_of_the_table() -> None:
    compiled = adapted("llama", lora(["embed"]), noise=0.1)
    seen: list[Tensor] = []

    def see(module: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        assert torch.equal(inputs[0], IDS)
        seen.append(output)

    compiled.get_input_embeddings().register_forward_hook(see)
    with torch.no_grad():
        compiled(input_ids=IDS)
        table = compiled.model.embed_tokens
        a, b = (table.get_parameter(f"graftc.lora.{part}") for part in "AB")
        plain = torch.nn.functional.embedding(IDS, table.weight)
    assert len(seen) == 1 and not torch.allclose(seen[0], plain) and a.shape != b.shape


@pytest.mark.slow
def test_the_module_itself_computes_nothing() -> None:
    with pytest.raises(GraftError, match="GC043"):
        adapted("llama", lora(["attn.q"]), noise=0.1).get_input_embeddings()(IDS)
