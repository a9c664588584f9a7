"""Calls with fewer inputs than were shown may not call every adapted module; those they call run as adapted."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import graftc
from graftc.testing import perturb
from tests.zoo.vision_language import llava

SPEC: dict[str, Any] = {
    "adapt": [{"method": "lora", "rank": 2, "target": {"modules": "**.{q_proj,v_proj}"}}],
    "train": ["model.multi_modal_projector"],
}


@pytest.mark.full
def test_texts_without_images_after_images() -> None:
    """The vision tower and the projector are adapted, but not called."""
    small = llava()
    torch.manual_seed(0)
    compiled = graftc.compile(SPEC, small.model, small.first, cache=False).eval()
    assert [row.level for row in compiled.report.stacks] == ["graph", "graph"]
    ids = torch.randint(10, 80, (3, 6))
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    assert torch.equal(compiled(**text).logits, small.model.eval()(**text).logits)
    perturb(compiled)
    merged = compiled.merge()
    plain = merged.to_transformers()
    for given in (text, dict(small.first), {"input_ids": ids}):
        torch.testing.assert_close(compiled(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(merged(**given).logits, plain(**given).logits, rtol=1e-4, atol=1e-5)
    with compiled.disabled():
        assert torch.equal(compiled(**text).logits, small.model(**text).logits)
    compiled.train()(**text).loss.backward()
    gradients = {name: p.grad for name, p in compiled.named_parameters() if p.requires_grad}
    assert all((grad is None) == ("language_model" not in name) for name, grad in gradients.items())
    hidden = torch.randn(2, 5, small.model.config.text_config.hidden_size)
    with pytest.raises(graftc.GraftError, match="GC031"):  # the module that computes them may be adapted
        compiled(inputs_embeds=hidden)
