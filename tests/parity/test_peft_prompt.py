"""Prompt tuning compared with peft, with peft's tensors copied over and padding in the batch."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

import graftc
from graftc.runtime.compiled import Compiled
from graftc.testing.families import tiny

LENGTH = 5
TOLERANCE = 1e-5
TASKS = {"bert": "SEQ_CLS", "gpt2": "CAUSAL_LM", "llama": "CAUSAL_LM", "t5": "SEQ_2_SEQ_LM"}


def batch(family: str) -> dict[str, Tensor]:
    """Tokens with padding at the end of two rows."""
    torch.manual_seed(1)
    ids = torch.randint(5, 50, (3, 9))
    mask = torch.ones_like(ids)
    mask[1, 6:], mask[2, 4:] = 0, 0
    inputs = {"input_ids": ids, "attention_mask": mask}
    return {**inputs, "decoder_input_ids": torch.randint(5, 50, (3, 4))} if family == "t5" else inputs


def theirs(family: str, stacks: int) -> tuple[Any, Tensor]:
    """Peft's model and its table, ``[length * stacks, width]``."""
    torch.manual_seed(2)
    config = peft.PromptTuningConfig(
        task_type=TASKS[family], num_virtual_tokens=LENGTH, num_transformer_submodules=stacks
    )
    model = peft.get_peft_model(copy.deepcopy(tiny(family)), config).eval()
    return model, model.prompt_encoder["default"].embedding.weight.detach()


def ours(family: str, table: Tensor, stacks: int) -> Compiled:
    """A model with our prompt and the same vectors."""
    role = ["encoder.embed.token", "decoder.embed.token"] if stacks == 2 else "embed.token"
    entry = {"method": "prompt", "length": LENGTH, "target": {"role": role}}
    compiled = graftc.compile({"adapt": [entry]}, tiny(family)).eval()
    names = sorted(compiled.adapter_state_dict(), reverse=True)  # the encoder's name comes first
    assert len(names) == stacks
    compiled.load_adapter_state_dict(dict(zip(names, table.split(LENGTH), strict=True)))
    return compiled


@pytest.mark.slow
@pytest.mark.sample("llama-1")
@pytest.mark.parametrize(("family", "stacks"), [("bert", 1), ("gpt2", 1), ("llama", 1), ("t5", 1)])
def test_prompt_tuning(family: str, stacks: int) -> None:
    """Logits of real tokens agree. Peft also returns those of virtual tokens, and it pools BERT's first position, a
    virtual token, while we pool the first token of the text, so that for BERT the layers are compared.
    """
    other, table = theirs(family, stacks)
    compiled = ours(family, table, stacks)
    inputs = batch(family)
    with torch.no_grad():
        actual = compiled(**inputs, **({"output_hidden_states": True} if family == "bert" else {}))
        expected = other(**inputs, **({"output_hidden_states": True} if family == "bert" else {}))
    real = inputs["attention_mask"].bool()
    if family == "bert":
        pairs = zip(actual.hidden_states, expected.hidden_states, strict=True)
        assert max(float((a - b[:, LENGTH:])[real].abs().max()) for a, b in pairs) <= TOLERANCE
        head = other.base_model
        logits = head.classifier(head.bert.pooler(expected.hidden_states[-1][:, LENGTH:]))
        assert float((actual.logits - logits).abs().max()) <= TOLERANCE
        return
    skip = LENGTH if family != "t5" else 0
    difference = actual.logits - expected.logits[:, skip:]
    assert float((difference if family == "t5" else difference[real]).abs().max()) <= TOLERANCE
