"""Certificates of models that take more than text run inputs of callers, whose ids say where images are."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing import perturb, randomise
from tests.runtime.deploy.beyond_text import BEYOND_TEXT

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
    """Return texts with an image of four tokens each, as the mask of image positions states."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(10, 200, (rows, length), generator=generator)
    ids[:, 1:5] = IMAGE
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    given["pixel_values"] = torch.randn(rows, 3, 56, 56, generator=generator)
    return {**given, "image_embeds_position_mask": (ids == IMAGE).long()}


@pytest.mark.full
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
        with pytest.raises(GraftError) as caught:  # it has no inputs to run yet
            loaded.merge()
        assert caught.value.code == "GC051" and "call it once" in str(caught.value)
        loaded(**batch(2, 11))
        torch.testing.assert_close(loaded.merge()(**given).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.full
@pytest.mark.parametrize("kind", sorted(BEYOND_TEXT))
def test_models(kind: str, tmp_path: Path) -> None:
    """Adapted, loaded, merged, saved and exported models compute as the source with folded weights, at two sizes."""
    torch.manual_seed(0)
    source, calls = BEYOND_TEXT[kind]()
    model = randomise(source).eval()
    # tied weights can only be folded together
    names = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and not n.endswith("lm_head")]
    spec = {"adapt": [{"method": "lora", "rank": 2, "alpha": 4, "target": {"modules": names}}]}
    compiled = graftc.compile(spec, model, calls[0]).eval()
    assert not any(differing(compiled, model, call, 1e-6) for call in calls)
    perturb(compiled, 0.1)
    folded = with_update(model, compiled)
    assert all(differing(model, folded, call, 1e-2) for call in calls)
    compiled.save(tmp_path / "artifact")
    merged = compiled.merge()
    merged.save(tmp_path / "merged")
    plain = type(model).from_pretrained(tmp_path / "merged").eval()  # type: ignore[attr-defined]
    loaded = graftc.load(tmp_path / "artifact", model=model).eval()
    for each in (compiled, merged, plain, loaded):
        assert not any(differing(each, folded, call, 1e-5) for call in calls)
    program = torch.export.load(merged.export(tmp_path / "merged.pt2", "pt2")).module()
    given = {name: value for name, value in calls[0].items() if isinstance(value, Tensor) and name != "labels"}
    with torch.no_grad():
        expected, outputs = folded(**given), program(**given)
    name = "logits" if "logits" in outputs else "logits_per_image"
    torch.testing.assert_close(outputs[name], expected[name], atol=1e-4, rtol=1e-4)


def with_update(model: nn.Module, compiled: nn.Module) -> nn.Module:
    """Return a copy of the source with the product of every LoRA's factors added to its weights."""
    updated, factors = copy.deepcopy(model), dict(compiled.named_parameters())
    for path in {name.partition(".graftc.")[0] for name in factors if ".graftc." in name}:
        own = {name.rpartition(".")[2]: t for name, t in factors.items() if name.startswith(f"{path}.graftc.")}
        with torch.no_grad():
            updated.get_parameter(f"{path}.weight").add_(2 * own["B"] @ own["A"])
    return updated


def differing(one: nn.Module, other: nn.Module, call: dict[str, Any], share: float) -> list[str]:
    """Return the names of outputs that differ by more than a share of the largest number."""
    with torch.no_grad():
        outputs, expected = one(**call), other(**call)
    tensors = {name: value for name, value in expected.items() if isinstance(value, Tensor)}
    return [n for n, v in tensors.items() if (outputs[n] - v).abs().max() > share * max(1.0, float(v.abs().max()))]
