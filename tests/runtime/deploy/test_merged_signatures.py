"""Models merged in part or as a whole take calls that the compiled model would have to capture first."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import graftc
from graftc.testing import perturb, tiny

IDS = torch.tensor([[5, 9, 4, 11, 7], [8, 3, 6, 2, 1]])
PLAIN: dict[str, Tensor] = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
CALLS: dict[str, dict[str, Any]] = {
    "labels": {**PLAIN, "labels": IDS},
    "hidden states": {**PLAIN, "labels": IDS, "output_hidden_states": True},
    "no mask": {"input_ids": IDS, "labels": IDS},
}
LORA = {"name": "a", "method": "lora", "rank": 2, "target": {"role": "attn.q"}}
PREFIX = {"name": "b", "method": "prefix", "length": 2, "target": {"role": "attn"}}
MERGES: dict[str, tuple[list[dict[str, Any]], Callable[[Any], Any]]] = {
    "whole": ([LORA], lambda compiled: compiled.merge()),
    "a copy": ([LORA], lambda compiled: copy.deepcopy(compiled.merge())),
    "in part": ([LORA, PREFIX], lambda compiled: compiled.merge_partially().merged),
    "the rest": ([LORA, PREFIX], lambda compiled: compiled.merge_partially().compiled),
}


@pytest.mark.full
@pytest.mark.sample("a copy-hidden states")
@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("merge", MERGES)
def test_a_call_that_is_new_to_it(merge: str, call: str) -> None:
    """Calls are right that the compiled model never had: constants of its graphs are taken over."""
    spec, merged_by = MERGES[merge]
    compiled = graftc.compile({"adapt": spec}, tiny("t5")).eval()
    perturb(compiled)
    merged = merged_by(compiled)
    with torch.no_grad():
        outputs, expected = merged(**CALLS[call]), compiled(**CALLS[call])
    torch.testing.assert_close(outputs.loss, expected.loss, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outputs.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.full
def test_an_export_that_is_new_to_it(tmp_path: Path) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, tiny("t5")).eval()
    perturb(compiled)
    given = {**PLAIN, "decoder_input_ids": IDS[:, :3].contiguous()}
    file = compiled.merge().export(tmp_path / "model.pt2", format="pt2", example_inputs=given)
    outputs = torch.export.load(file).module()(**given)
    torch.testing.assert_close(outputs["logits"], compiled(**given).logits, atol=1e-4, rtol=1e-4)
