"""Graphs with a cache are compared with the model in two steps: a prompt, and then a single token."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

import graftc
from graftc.compiler.capture.anchoring import runs
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.families import tiny

SPEC: dict[str, Any] = {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]}
IDS = torch.tensor([[5, 9, 23, 7]])


def odd(where: Callable[[int, int], bool]) -> Any:
    """Return a Llama with other logits if a condition on the past's length and the number of new tokens holds."""

    class Odd(LlamaForCausalLM):  # type: ignore[no-untyped-call]
        def forward(self, input_ids: Any = None, cache: Any = None, **kwargs: Any) -> Any:
            past = cache.get_seq_length() if cache is not None else -1
            outputs = super().forward(input_ids=input_ids, cache=cache, **kwargs)
            if where(past, input_ids.shape[1]):
                outputs.logits = outputs.logits * 2
            return outputs

    model: Any = tiny("llama")
    model.__class__ = Odd
    return model


@pytest.mark.full
@pytest.mark.sample("prompts")
@pytest.mark.parametrize(
    "where", [lambda past, new: past == 0, lambda past, new: past > 0 and new == 1], ids=["prompts", "single tokens"]
)
def test_what_a_graph_does_not_show_is_found(where: Callable[[int, int], bool]) -> None:
    """The tracer sees several tokens after a past, so neither branch is in the graph."""
    compiled = graftc.compile(SPEC, odd(where)).eval()
    with pytest.raises(GraftError) as error:
        compiled(IDS, use_cache=True)
    assert error.value.code in ("GC031", "GC041"), error.value


@pytest.mark.full
def test_steps_are_as_many_as_said(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[tuple[int, int]] = []
    against = runs.Runs.against

    def noted(self: Any, run: Any, bound: float) -> Any:
        if "past_0_key" in run.inputs:
            lengths.append((run.inputs["past_0_key"].shape[2], run.inputs["input_ids"].shape[1]))
        return against(self, run, bound)

    monkeypatch.setattr(runs.Runs, "against", noted)
    compiled = graftc.compile(SPEC, tiny("llama"), cache=False).eval()
    compiled(IDS, use_cache=True)
    first = next(tokens for past, tokens in lengths if past == 0)
    assert {(0, first), (1, 1)} <= set(lengths)
    assert any(past > 0 and new > 1 for past, new in lengths)
    (signature,) = (f for s, f in compiled.compilation.signatures.items() if "use_cache=True" in s.inputs)
    assert all(record.passed and record.difference is not None for record in signature.anchors)
