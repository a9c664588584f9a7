"""Models that read texts with images of different sizes: as patches in one list, in crops, padded, or in tiles."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from tests.zoo.model import (
    CLIP_VISION,
    END,
    IMAGE,
    LANGUAGE,
    LAYERS,
    SIGLIP_VISION,
    START,
    VIDEO,
    Small,
    built,
    noise,
    reaching,
    texts,
)

Rows = Sequence[tuple[Sequence[tuple[int, int]], int]]
"""The heights and widths of each row's images, and how many words it has."""

QWEN3_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "out_hidden_size": 64,
    "num_heads": 4,
    "intermediate_size": 96,
    "patch_size": 16,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0],
}


def _qwen(
    kind: Callable[[Any], nn.Module], config: Callable[..., object], vision: dict[str, Any], **text: Any
) -> Small:
    """Build a model with images as one list of patches, their sizes in patches, and four patches a token."""
    rope = {"rope_type": "default", "type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
    filled = config(
        text_config={**LANGUAGE, "rope_parameters": rope, **text},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )

    def batch(rows: Rows, seed: int) -> dict[str, Any]:
        inputs = texts([([h * w // 4 for h, w in sizes], words) for sizes, words in rows], seed, enclosed=True)
        every = [size for sizes, _ in rows for size in sizes]
        numbers = 3 * 2 * vision["patch_size"] ** 2  # the colours of two frames of a patch
        return {
            **inputs,
            "pixel_values": noise(seed, sum(h * w for h, w in every), numbers),
            "image_grid_thw": torch.tensor([(1, h, w) for h, w in every]),
            "mm_token_type_ids": (inputs["input_ids"] == IMAGE).long(),
        }

    first = batch([([(4, 4), (4, 8)], 7), ([(6, 4)], 9)], 0)
    second = batch([([(8, 4)], 5), ([(4, 4)], 9), ([(4, 6), (8, 8)], 12)], 1)
    return Small(built(kind, filled), first, second, generates=True)


def qwen2_vl() -> Small:
    """Images of any size: positions and which patches attend to each other depend on values of a tensor of sizes."""
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    vision = {"depth": 2, "embed_dim": 64, "hidden_size": 64, "num_heads": 4, "mlp_ratio": 2, "patch_size": 14}
    return _qwen(Qwen2VLForConditionalGeneration, Qwen2VLConfig, vision)


def qwen2_5_vl() -> Small:
    """Images of any size, split into windows whose lengths, like the order of patches, are values of a tensor."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": 64,
        "out_hidden_size": 64,
        "num_heads": 4,
        "intermediate_size": 96,
        "patch_size": 14,
        "window_size": 56,
        "fullatt_block_indexes": [1],
    }
    return _qwen(Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLConfig, vision)


def qwen3_vl() -> Small:
    """Images of any size, with features of an early layer that are added to the image tokens in the text's layers."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    return _qwen(Qwen3VLForConditionalGeneration, Qwen3VLConfig, QWEN3_VISION)


def qwen3_vl_moe() -> Small:
    """Like Qwen3-VL, with experts in the layers of the text."""
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _qwen(Qwen3VLMoeForConditionalGeneration, Qwen3VLMoeConfig, QWEN3_VISION, **experts)


CROPS = {(56, 100): (3, 52), (90, 50): (3, 56), (100, 100): (5, 88), (50, 112): (3, 52), (56, 70): (3, 44)}
"""Into how many crops an image of a height and width is cut, itself made small among them, and its tokens."""


def _cropped(
    kind: Callable[[Any], nn.Module], config: Callable[..., object], vision: dict[str, Any], **own: Any
) -> Small:
    """Build a model with one image a row, in crops padded with black ones; original sizes are values of a tensor."""
    filled = config(
        text_config={**LANGUAGE, "model_type": "llama"},
        vision_config=vision,
        image_token_index=IMAGE,
        image_grid_pinpoints=[[56, 112], [112, 56], [112, 112]],
        **own,
    )

    def batch(rows: Sequence[tuple[tuple[int, int], int]], seed: int) -> dict[str, Any]:
        crops = [CROPS[size][0] for size, _ in rows]
        kept = reaching(crops, max(crops))[..., None, None, None]
        return {
            **texts([([CROPS[size][1]], words) for size, words in rows], seed),
            "pixel_values": noise(seed, len(rows), max(crops), 3, 56, 56) * kept,
            "image_sizes": torch.tensor([size for size, _ in rows]),
        }

    first = batch([((56, 100), 7), ((90, 50), 9)], 0)
    second = batch([((100, 100), 5), ((50, 112), 9), ((56, 70), 4)], 1)
    return Small(built(kind, filled), first, second, generates=True)


def llava_next() -> Small:
    """Images in crops, whose number, and the features that are cut off, depend on values of a tensor of sizes."""
    from transformers import LlavaNextConfig, LlavaNextForConditionalGeneration

    return _cropped(LlavaNextForConditionalGeneration, LlavaNextConfig, CLIP_VISION)


def llava_onevision() -> Small:
    """Images in crops, as in LLaVA-NeXT, with the features of all patches of the last layer."""
    from transformers import LlavaOnevisionConfig, LlavaOnevisionForConditionalGeneration

    features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
    return _cropped(LlavaOnevisionForConditionalGeneration, LlavaOnevisionConfig, SIGLIP_VISION, **features)


PIXTRAL_VISION: dict[str, Any] = {
    **LAYERS,
    "model_type": "pixtral",
    "head_dim": 16,
    "image_size": 112,
    "patch_size": 14,
}


def _pixtral(model: nn.Module, token: int) -> Small:
    """Build batches of images padded to the largest, with their sizes; a token is a square of `token` pixels."""

    def batch(rows: Rows, seed: int) -> dict[str, Any]:
        every = [size for sizes, _ in rows for size in sizes]
        height, width = max(h for h, _ in every), max(w for _, w in every)
        pixels = noise(seed, len(every), 3, height, width)
        for image, (h, w) in zip(pixels, every, strict=True):
            image[:, h:] = 0
            image[:, :, w:] = 0
        return {
            **texts([([(h // token) * (w // token) for h, w in sizes], words) for sizes, words in rows], seed),
            "pixel_values": pixels,
            "image_sizes": torch.tensor(every),
        }

    first = batch([([(56, 84), (56, 56)], 7), ([(84, 56)], 9)], 0)
    second = batch([([(112, 56)], 5), ([(56, 112)], 9), ([(84, 84), (56, 56)], 4)], 1)
    return Small(model, first, second, generates=True)


def mistral3() -> Small:
    """Images of any size, cropped from padded ones by values of a tensor of sizes; four patches form a token."""
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    config = Mistral3Config(
        text_config={**LANGUAGE, "model_type": "mistral"},
        vision_config=PIXTRAL_VISION,
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return _pixtral(built(Mistral3ForConditionalGeneration, config), 28)


def pixtral_llava() -> Small:
    """Images of any size, cropped from padded ones by values of a tensor of sizes; each patch is a token."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={**LANGUAGE, "model_type": "mistral"},
        vision_config=PIXTRAL_VISION,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    return _pixtral(built(LlavaForConditionalGeneration, config), 14)


def mllama() -> Small:
    """Images in up to four tiles; the shape of the tiles is a number, and cross-attention to them has a mask."""
    from transformers import MllamaConfig, MllamaForConditionalGeneration

    most = 4
    shapes = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]
    text = {
        **LANGUAGE,
        "num_hidden_layers": 4,
        "cross_attention_layers": [1, 3],
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    }
    vision = {
        **LAYERS,
        "num_global_layers": 2,
        "attention_heads": 4,
        "image_size": 28,
        "patch_size": 14,
        "vision_output_dim": 128,
        "intermediate_layers_indices": [0],
        "max_num_tiles": most,
        "supported_aspect_ratios": [list(shape) for shape in shapes],
    }
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=IMAGE)

    def batch(rows: Sequence[tuple[tuple[int, int], int]], seed: int) -> dict[str, Any]:
        inputs = texts([([1], words) for _, words in rows], seed)
        tiles = reaching([down * across for (down, across), _ in rows], most)
        seen = tiles[:, None, None].repeat(1, inputs["input_ids"].shape[1], 1, 1)
        seen[:, 0] = 0
        return {
            **inputs,
            "pixel_values": noise(seed, len(rows), 1, most, 3, 28, 28),
            "aspect_ratio_ids": torch.tensor([[1 + shapes.index(shape)] for shape, _ in rows]),
            "aspect_ratio_mask": tiles[:, None],
            "cross_attention_mask": seen,
        }

    first = batch([((1, 1), 9), ((1, 2), 7)], 0)
    second = batch([((2, 2), 12), ((1, 1), 4), ((1, 2), 6)], 1)
    return Small(built(MllamaForConditionalGeneration, config), first, second, generates=True)
