"""Logits of each row's last token, for padding on either side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from graftc.passes.core.ir.codegen import executable_of
from graftc.passes.core.ir.program import Program
from graftc.passes.graph.last_tokens import at_last_tokens
from graftc.runtime.model.runner import runner_of
from tests.kit.language_models import VOCABULARY, language_model
from tests.kit.models import fresh

pytestmark = pytest.mark.slow

MASK = torch.tensor([[1] * 7, [0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 0, 1, 0, 1, 1, 0]])
LAST = [6, 6, 3, 5]


def logits(model: Any, program: Program, inputs: dict[str, Tensor]) -> Tensor:
    executable = executable_of(program.graph, torch.device("cpu"))
    store = runner_of(model).store
    tensors = {name: store.full(name) for name in executable.tensors}
    with torch.no_grad():
        values = executable(tensors, [inputs[name] for name in program.signature])
    return dict(zip(program.outputs.names, values, strict=True))["logits"]  # type: ignore[no-any-return]


@pytest.mark.sample("llama")
@pytest.mark.parametrize(
    "family",
    ["llama", "gemma2", *(pytest.param(name, marks=pytest.mark.full) for name in ("gpt2", "opt", "mixtral", "falcon"))],
)
def test_they_are_those_of_the_last_tokens(family: str) -> None:
    """Gemma 2 bounds its logits, and everything behind the layers is computed for one position in each row."""
    lora = {"method": "lora", "rank": 2, "target": {"modules": "lm_head"}}
    # transformers' windows under masks overflow in float64
    dtype, atol = (torch.float32, 1e-4) if family == "gemma2" else (torch.float64, 1e-10)
    model = fresh(language_model(family).to(dtype), lora).eval()
    whole = model.program("eval")
    ids = torch.arange(4 * 7).reshape(4, 7) * 5 % (VOCABULARY - 3) + 3
    inputs = {"input_ids": ids, "attention_mask": MASK}
    program = at_last_tokens(whole, "logits", "input_ids", "attention_mask")
    expected = logits(model, whole, inputs)
    for own, columns in ((program, LAST), (at_last_tokens(whole, "logits", "input_ids", None), [6] * 4)):
        last = logits(model, own, inputs)
        torch.testing.assert_close(last, expected[torch.arange(4), columns].unsqueeze(1), rtol=0, atol=atol)
    wide = [node for node in program.graph.nodes if VOCABULARY in getattr(node.meta.get("val"), "shape", ())]
    assert {node.meta["val"].shape[1] for node in wide if node.meta["val"].dim() == 3} == {1}
    assert not any(node.target is torch.ops.aten.gather.default for node in whole.graph.nodes)


def test_outputs_that_have_no_tokens() -> None:
    model = fresh(language_model("llama"), {"method": "lora", "rank": 2, "target": {"role": "attn.q"}})
    program = model.program("eval")
    assert at_last_tokens(program, "hidden", "input_ids", None) is program
    assert at_last_tokens(program, "logits", "pixels", None) is program
    last = at_last_tokens(program, "logits", "input_ids", None)
    assert at_last_tokens(last, "logits", "input_ids", None) is last
