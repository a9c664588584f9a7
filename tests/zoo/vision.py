"""Models of images that generate no text: pairs of images and texts, detection, documents."""

from __future__ import annotations

from typing import Any

import torch

from tests.zoo.model import CLIP_VISION, LAYERS, PATCHES, SIGLIP_VISION, VOCABULARY, Small, built, noise, texts, tokens

CAPTION: dict[str, Any] = {
    **LAYERS,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 32,
    "projection_dim": 32,
    "eos_token_id": 2,
    "bos_token_id": 1,
    "pad_token_id": 0,
}


def _pairs(rows: int, words: int, seed: int) -> dict[str, Any]:
    """Return as many images as texts; each text ends with the end token."""
    inputs = texts([([], words)] * rows, seed)
    inputs["input_ids"][:, -1] = 2
    return {
        "input_ids": inputs["input_ids"],
        "attention_mask": inputs["attention_mask"],
        "pixel_values": noise(seed, rows, 3, 56, 56),
        "return_loss": True,
    }


def clip() -> Small:
    """Images and texts, with a loss that compares all of them; the state of a text is located by its ids."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=CAPTION, vision_config=CLIP_VISION, projection_dim=32)
    return Small(built(CLIPModel, config), _pairs(3, 9, 0), _pairs(4, 6, 1))


def siglip() -> Small:
    """Images and texts without a mask, with a loss over every pair."""
    from transformers import SiglipConfig, SiglipModel

    config = SiglipConfig(
        text_config={**CAPTION, "projection_size": 64},
        vision_config={**SIGLIP_VISION, "vision_use_head": True},
    )
    first, second = _pairs(3, 9, 0), _pairs(4, 6, 1)
    del first["attention_mask"], second["attention_mask"]
    return Small(built(SiglipModel, config), first, second)


def owlvit() -> Small:
    """Several texts to look for in each image; their number is the quotient of the two numbers of rows."""
    from transformers import OwlViTConfig, OwlViTForObjectDetection

    config = OwlViTConfig(
        text_config={**CAPTION, "max_position_embeddings": 16}, vision_config=PATCHES, projection_dim=64
    )

    def batch(images: int, queries: int, seed: int) -> dict[str, Any]:
        return {
            "input_ids": tokens(seed, images * queries, 8),
            "attention_mask": torch.ones(images * queries, 8, dtype=torch.long),
            "pixel_values": noise(seed, images, 3, 56, 56),
        }

    return Small(built(OwlViTForObjectDetection, config), batch(2, 3, 0), batch(3, 2, 1))


def detr() -> Small:
    """Portrait and landscape images, whose mask is resized to that of their features; convolutions come first."""
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    backbone: dict[str, Any] = {
        "embedding_size": 16,
        "hidden_sizes": [16, 32, 48, 64],
        "depths": [1, 1, 1, 1],
        "layer_type": "basic",
        "out_features": ["stage4"],
    }
    sizes: dict[str, Any] = {
        "use_timm_backbone": False,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "num_queries": 8,
        "dropout": 0.0,
        "num_labels": 5,
    }
    config = DetrConfig(backbone_config=ResNetConfig(**backbone), **sizes)

    def batch(rows: int, height: int, width: int, seed: int) -> dict[str, Any]:
        mask = torch.ones(rows, height, width, dtype=torch.long)
        return {"pixel_values": noise(seed, rows, 3, height, width), "pixel_mask": mask}

    return Small(built(DetrForObjectDetection, config), batch(2, 64, 96, 0), batch(3, 96, 64, 1))


def layoutlmv3() -> Small:
    """Pages: words, the boxes in which they are printed, as integers, and the image."""
    from transformers import LayoutLMv3Config, LayoutLMv3ForTokenClassification

    sizes: dict[str, Any] = {
        **LAYERS,
        "vocab_size": VOCABULARY,
        "coordinate_size": 10,
        "shape_size": 12,
        "input_size": 56,
        "patch_size": 14,
        "num_labels": 5,
        "max_2d_position_embeddings": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }

    def batch(rows: int, words: int, seed: int) -> dict[str, Any]:
        corners = tokens(seed, rows, words, 2, 2, low=0, high=100).sort(dim=2).values
        return {
            "input_ids": tokens(seed, rows, words),
            "bbox": corners.flatten(2),
            "attention_mask": torch.ones(rows, words, dtype=torch.long),
            "pixel_values": noise(seed, rows, 3, 56, 56),
            "labels": tokens(seed + 2, rows, words, low=0, high=5),
        }

    model = built(LayoutLMv3ForTokenClassification, LayoutLMv3Config(**sizes))
    return Small(model, batch(2, 9, 0), batch(3, 13, 1), fallback="**.{query,value}")
