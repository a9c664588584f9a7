"""Outputs have their fields in the order of the model's own outputs, whatever the order of the constructor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import graftc


class Pooled(nn.Module):
    """A model that sets the pooled field last, although the class has it second."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 6)

    def forward(self, x: torch.Tensor) -> Any:
        hidden = self.up(x)
        outputs = BaseModelOutputWithPooling(last_hidden_state=hidden)
        outputs.hidden_states = (x, hidden)
        outputs.pooler_output = hidden.mean(1)
        return outputs


def test_fields_stand_where_the_model_has_set_them() -> None:
    torch.manual_seed(0)
    model = Pooled().eval()
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "up"}}]}
    compiled = graftc.compile(spec, model, {"x": torch.randn(2, 3, 4)}, cache=False).eval()
    x = torch.randn(3, 5, 4)
    wanted, actual = model(x), compiled(x)
    assert type(actual) is type(wanted) and list(actual) == list(wanted) == [
        "last_hidden_state",
        "hidden_states",
        "pooler_output",
    ]
    assert torch.equal(actual[2], wanted[2]) and torch.equal(actual.pooler_output, wanted.pooler_output)
    assert torch.equal(actual.to_tuple()[1][1], wanted.to_tuple()[1][1])
