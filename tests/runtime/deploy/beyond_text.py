"""Small models that take more than text, or keep another kind of state, each with calls of two sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

IMAGE = 250
Calls = tuple[dict[str, Any], dict[str, Any]]

_TEXT: dict[str, Any] = {
    **{"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2},
    **{
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
}
_DECODER: dict[str, Any] = {**_TEXT, "num_key_value_heads": 2, "head_dim": 16, "use_cache": False}
_IMAGES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"image_size": 56, "patch_size": 14},
}


def texts(rows: int, length: int, images: int = 0) -> dict[str, Tensor]:
    """Return texts that begin with the tokens of an image, the first one padded on the left by two."""
    generator = torch.Generator().manual_seed(rows)
    ids = torch.randint(10, 200, (rows, length + images), generator=generator)
    ids[:, 2 : 2 + images] = IMAGE
    ids[0, :2] = 0
    labels = ids.masked_fill((ids == IMAGE) | (ids == 0), -100)
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}


def pictures(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 56, 56, generator=torch.Generator().manual_seed(rows))}


def _with_images(model: nn.Module, tokens: int) -> tuple[nn.Module, Calls]:
    first, other = ({**texts(rows, length, tokens), **pictures(rows)} for rows, length in ((2, 9), (3, 12)))
    return model, (first, other)


def _llava() -> tuple[nn.Module, Calls]:
    vision = {**_IMAGES, "model_type": "clip_vision_model", "num_hidden_layers": 3, "projection_dim": 64}
    config = transformers.LlavaConfig(
        text_config={**_DECODER, "model_type": "llama"},
        vision_config=vision,
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return _with_images(transformers.LlavaForConditionalGeneration(config), 16)


def _paligemma() -> tuple[nn.Module, Calls]:
    config = transformers.PaliGemmaConfig(
        text_config={**_DECODER, "model_type": "gemma"},
        vision_config={**_IMAGES, "model_type": "siglip_vision_model", "vision_use_head": False, "projection_dim": 64},
        image_token_index=IMAGE,
        projection_dim=64,
        hidden_size=64,
    )
    model, calls = _with_images(transformers.PaliGemmaForConditionalGeneration(config), 16)
    for call in calls:
        call["token_type_ids"] = (call["input_ids"] != IMAGE).long()
    return model, calls


def _blip2() -> tuple[nn.Module, Calls]:
    former = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {"vocab_size": 300, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.Blip2Config(
        vision_config=_IMAGES,
        qformer_config={**former, "encoder_hidden_size": 64, "vocab_size": 300},
        text_config={**text, "model_type": "opt", "word_embed_proj_dim": 64, "max_position_embeddings": 64},
        num_query_tokens=4,
        image_token_index=IMAGE,
    )
    return _with_images(transformers.Blip2ForConditionalGeneration(config), 4)


def _siglip() -> tuple[nn.Module, Calls]:
    config = transformers.SiglipConfig(
        text_config={**_TEXT, "projection_size": 64},
        vision_config=_IMAGES,
    )
    first, other = (
        {"input_ids": texts(rows, length)["input_ids"], **pictures(rows), "return_loss": True}
        for rows, length in ((3, 9), (4, 6))
    )
    return transformers.SiglipModel(config), (first, other)


def _mamba2() -> tuple[nn.Module, Calls]:
    sizes: dict[str, Any] = {
        "vocab_size": 300,
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "state_size": 16,
        "head_dim": 16,
    }
    config = transformers.Mamba2Config(**sizes, num_heads=8, n_groups=1, chunk_size=16, pad_token_id=0, use_cache=False)
    return transformers.Mamba2ForCausalLM(config), (texts(2, 12), texts(3, 17))


BEYOND_TEXT: dict[str, Callable[[], tuple[nn.Module, Calls]]] = {
    "blip2": _blip2,
    "llava": _llava,
    "mamba2": _mamba2,
    "paligemma": _paligemma,
    "siglip": _siglip,
}
