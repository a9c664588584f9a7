"""Certificates of models that take more than texts run what callers gave: ids say where images stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, randomise

SPECS: dict[str, dict[str, Any]] = {
    "all queries": {"adapt": [{"method": "lora", "rank": 2, "target": {"role": "attn.q"}}]},
    "images": {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "vision_model.**.v_proj"}}]},
    "texts": {"adapt": [{"method": "dora", "rank": 2, "target": {"modules": "text_model.**.fc1"}}]},
}
IMAGE = 250


@pytest.fixture(scope="module")
def kosmos() -> nn.Module:
    text = {"vocab_size": 300, "embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4, "layerdrop": 0.0}
    vision = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Kosmos2Config(
        text_config={**text, "max_position_embeddings": 256},
        vision_config={**vision, "image_size": 56, "patch_size": 14},
        latent_query_num=4,
    )
    torch.manual_seed(0)
    return randomise(transformers.Kosmos2ForConditionalGeneration(config)).eval()


def batch(rows: int, length: int) -> dict[str, Tensor]:
    """Texts with an image of four tokens each, which the mask of places says."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(10, 200, (rows, length), generator=generator)
    ids[:, 1:5] = IMAGE
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["pixel_values"] = torch.randn(rows, 3, 56, 56, generator=generator)
    return {**given, "image_embeds_position_mask": (ids == IMAGE).long()}


@pytest.mark.slow
@pytest.mark.sample("all queries")
@pytest.mark.parametrize("spec", SPECS)
def test_merged_and_saved(spec: str, kosmos: nn.Module, tmp_path: Path) -> None:
    compiled = graftc.compile(SPECS[spec], kosmos, batch(2, 11)).eval()
    perturb(compiled)
    given = batch(3, 14)
    with torch.no_grad():
        expected = compiled(**given).logits
        assert (expected - kosmos(**given).logits).abs().max() > 1e-4
        merged = compiled.merge()
        torch.testing.assert_close(merged(**given).logits, expected, atol=1e-5, rtol=1e-5)
        assert max(merged.certificate.outputs.values()) < 1e-3
        compiled.save(tmp_path / "artifact")
        loaded = graftc.load(tmp_path / "artifact", model=kosmos).eval()
        with pytest.raises(GraftError) as caught:  # it has nothing to run yet
            loaded.merge()
        assert caught.value.code == "GC051" and "call it once" in str(caught.value)
        loaded(**batch(2, 11))
        torch.testing.assert_close(loaded.merge()(**given).logits, expected, atol=1e-5, rtol=1e-5)
