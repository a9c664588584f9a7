"""Models that read texts with images, all of one size."""

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
    PATCHES,
    SIGLIP_VISION,
    START,
    VOCABULARY,
    Small,
    built,
    noise,
    texts,
    tokens,
)

Rows = Sequence[tuple[int, int]]
"""How many images each row has, and how many words."""

FIRST, SECOND = ((2, 7), (1, 9)), ((1, 5), (1, 9), (3, 12))
FIRST_SINGLE, SECOND_SINGLE = ((1, 7), (1, 9)), ((1, 5), (1, 9), (1, 12))


def _images(rows: Rows, seed: int, each: int) -> dict[str, Any]:
    """Return texts and the images of all rows, one after the other; an image takes `each` tokens."""
    count = sum(images for images, _ in rows)
    return {
        **texts([([each] * images, words) for images, words in rows], seed),
        "pixel_values": noise(seed, count, 3, 56, 56),
    }


def _padded_images(rows: Rows, seed: int) -> dict[str, Any]:
    """Return texts and each row's images, padded with black ones that a mask hides; an image takes four tokens."""
    counts = [images for images, _ in rows]
    shown = (torch.arange(max(counts)) < torch.tensor(counts)[:, None])[..., None, None]
    return {
        **texts([([4] * images, words) for images, words in rows], seed),
        "pixel_values": noise(seed, len(rows), max(counts), 3, 56, 56) * shown[..., None],
        "pixel_attention_mask": shown.expand(-1, -1, 56, 56).contiguous(),
    }


def _several(model: nn.Module, each: int) -> Small:
    return Small(model, _images(FIRST, 0, each), _images(SECOND, 1, each), generates=True)


def _padded(model: nn.Module) -> Small:
    return Small(model, _padded_images(FIRST, 0), _padded_images(SECOND, 1), generates=True)


def llava() -> Small:
    """Rows with different numbers of images, whose features are put into the text with a mask of the tokens."""
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        text_config={**LANGUAGE, "model_type": "llama"},
        vision_config=CLIP_VISION,
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return _several(built(LlavaForConditionalGeneration, config), 16)


def paligemma() -> Small:
    """One image a row; token types mark the beginning of the part that attends only to what precedes it."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    config = PaliGemmaConfig(
        text_config={**LANGUAGE, "model_type": "gemma"},
        vision_config={**SIGLIP_VISION, "projection_dim": 64},
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )

    def batch(rows: Rows, seed: int) -> dict[str, Any]:
        inputs = _images(rows, seed, 16)
        count, length = inputs["input_ids"].shape
        return {**inputs, "token_type_ids": (torch.arange(length) > 20).long().repeat(count, 1)}

    model = built(PaliGemmaForConditionalGeneration, config)
    return Small(model, batch(FIRST_SINGLE, 0), batch(SECOND_SINGLE, 1), generates=True)


def gemma3_mm() -> Small:
    """Token types mark the images, whose tokens attend to each other both ways: a mask computed from values."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    config = Gemma3Config(
        text_config={**LANGUAGE, "sliding_window": 32, "query_pre_attn_scalar": 16},
        vision_config=SIGLIP_VISION,
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )

    def batch(rows: Rows, seed: int) -> dict[str, Any]:
        inputs = _images(rows, seed, 4)
        return {**inputs, "token_type_ids": (inputs["input_ids"] == IMAGE).long()}

    return Small(built(Gemma3ForConditionalGeneration, config), batch(FIRST, 0), batch(SECOND, 1), generates=True)


def _idefics3_like(kind: Callable[[Any], nn.Module], config: Callable[..., object]) -> Small:
    filled = config(
        text_config={**LANGUAGE, "model_type": "llama"},
        vision_config=PATCHES,
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=0,
    )
    return _padded(built(kind, filled))


def idefics3() -> Small:
    """Rows are padded with black images, which the model finds by their values and leaves out."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration

    return _idefics3_like(Idefics3ForConditionalGeneration, Idefics3Config)


def smolvlm() -> Small:
    """Like Idefics3, with features that are put into blocks of the text by running sums of its image tokens."""
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    return _idefics3_like(SmolVLMForConditionalGeneration, SmolVLMConfig)


def idefics2() -> Small:
    """Rows are padded with black images; a resampler makes four tokens of each image that is left."""
    from transformers import Idefics2Config, Idefics2ForConditionalGeneration

    perceiver = {
        "hidden_size": 64,
        "resampler_n_latents": 4,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 16,
        "num_key_value_heads": 2,
    }
    config = Idefics2Config(
        text_config={**LANGUAGE, "model_type": "mistral"},
        vision_config=PATCHES,
        perceiver_config=perceiver,
        image_token_id=IMAGE,
    )
    return _padded(built(Idefics2ForConditionalGeneration, config))


def internvl() -> Small:
    """Rows with different numbers of images, each reduced to four tokens by a pixel shuffle."""
    from transformers import InternVLConfig, InternVLForConditionalGeneration

    config = InternVLConfig(
        text_config={**LANGUAGE, "model_type": "qwen2"},
        vision_config={**PATCHES, "image_size": [56, 56], "patch_size": [14, 14]},
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return _several(built(InternVLForConditionalGeneration, config), 4)


def aria() -> Small:
    """Experts that read texts with images; the number of queries of an image is looked up by its number of patches."""
    from transformers import AriaConfig, AriaForConditionalGeneration

    experts = {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1, "intermediate_size": 32}
    config = AriaConfig(
        text_config={**{name: value for name, value in LANGUAGE.items() if name != "head_dim"}, **experts},
        vision_config={**PATCHES, "model_type": "idefics3_vision"},
        image_token_index=IMAGE,
        projector_patch_to_query_dict={16: 4},
    )
    return _several(built(AriaForConditionalGeneration, config), 4)


def florence2() -> Small:
    """An encoder of texts with images and a decoder that gets labels only; attention over windows and channels."""
    from transformers import Florence2Config, Florence2ForConditionalGeneration

    text = {
        "model_type": "bart",
        "vocab_size": VOCABULARY,
        "d_model": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 96,
        "decoder_ffn_dim": 96,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }
    vision = {
        "depths": [1, 1, 2, 1],
        "embed_dim": [16, 32, 48, 64],
        "num_heads": [1, 2, 3, 4],
        "num_groups": [1, 2, 3, 4],
        "window_size": 4,
        "projection_dim": 64,
        "drop_path_rate": 0.0,
    }
    config = Florence2Config(text_config=text, vision_config=vision, image_token_id=IMAGE)

    def batch(words: Sequence[int], seed: int) -> dict[str, Any]:
        each = (64 // 32) ** 2 + 1  # the patches of the last stage, and their mean
        inputs = texts([([each], count) for count in words], seed)
        return {
            "input_ids": inputs["input_ids"],
            "attention_mask": inputs["attention_mask"],
            "pixel_values": noise(seed, len(words), 3, 64, 64),
            "labels": tokens(seed, len(words), 6, low=10),
        }

    return Small(built(Florence2ForConditionalGeneration, config), batch((7, 9), 0), batch((5, 9, 4), 1))


def blip2() -> Small:
    """One image a row, which learnt queries turn into four tokens."""
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    queries = {
        **LAYERS,
        "encoder_hidden_size": 64,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "vocab_size": VOCABULARY,
    }
    text = {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "ffn_dim": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 64,
        "dropout": 0.0,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
    }
    config = Blip2Config(
        vision_config=PATCHES,
        qformer_config=queries,
        text_config=text,
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    model = built(Blip2ForConditionalGeneration, config)
    return Small(model, _images(FIRST_SINGLE, 0, 4), _images(SECOND_SINGLE, 1, 4), generates=True)


def kosmos2() -> Small:
    """One image a row, whose positions in the text are a separate input."""
    from transformers import Kosmos2Config, Kosmos2ForConditionalGeneration

    text = {
        "vocab_size": VOCABULARY,
        "embed_dim": 64,
        "layers": 2,
        "ffn_dim": 96,
        "attention_heads": 4,
        "max_position_embeddings": 256,
        "dropout": 0.0,
        "attention_dropout": 0.0,
        "activation_dropout": 0.0,
        "layerdrop": 0.0,
    }
    config = Kosmos2Config(text_config=text, vision_config=PATCHES, latent_query_num=4)

    def batch(rows: Rows, seed: int) -> dict[str, Any]:
        inputs = _images(rows, seed, 4)
        return {**inputs, "image_embeds_position_mask": (inputs["input_ids"] == IMAGE).long()}

    return Small(built(Kosmos2ForConditionalGeneration, config), batch(FIRST_SINGLE, 0), batch(SECOND_SINGLE, 1))
