"""Hidden states of layers that are alike: the tracer treats a cast that changes nothing as the tensor it is given."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.compiler.capture.capture import capture
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import axes_of
from graftc.testing.families import tiny

DEPTH = 7
IDS = torch.randint(3, 90, (2, 6), generator=torch.Generator().manual_seed(0))


@pytest.mark.full
@pytest.mark.parametrize(
    "family", ["llama", pytest.param("gpt2", marks=pytest.mark.full), pytest.param("bert", marks=pytest.mark.full)]
)
def test_layers_are_traced_once_for_hidden_states(family: str) -> None:
    model = tiny(family, layers=DEPTH).requires_grad_(False).eval()
    axes = axes_of(model, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)})
    assert capture(CaptureRequest.of(model, axes, (("output_hidden_states", True),))).alike == DEPTH - 2
    compiled: Any = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "ffn.up"}}]}, model, cache=False)
    ours = compiled.eval()(input_ids=IDS, output_hidden_states=True).hidden_states
    theirs = model(input_ids=IDS, output_hidden_states=True).hidden_states
    assert len(ours) == len(theirs) == DEPTH + 1
    for own, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, other, rtol=0, atol=1e-6)
