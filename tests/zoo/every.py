"""All models of the zoo by name."""

from __future__ import annotations

from collections.abc import Callable

from tests.zoo.audio import granite_speech, qwen2_audio, voxtral, wav2vec2, whisper
from tests.zoo.model import Small
from tests.zoo.sized_images import (
    llava_next,
    llava_onevision,
    mistral3,
    mllama,
    pixtral_llava,
    qwen2_5_vl,
    qwen2_vl,
    qwen3_vl,
    qwen3_vl_moe,
)
from tests.zoo.text import falcon_h1, jamba, mamba2, mixtral
from tests.zoo.vision import clip, detr, layoutlmv3, owlvit, siglip
from tests.zoo.vision_language import (
    aria,
    blip2,
    florence2,
    gemma3_mm,
    idefics2,
    idefics3,
    internvl,
    kosmos2,
    llava,
    paligemma,
    smolvlm,
)

EVERY: dict[str, Callable[[], Small]] = {
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "qwen3_vl": qwen3_vl,
    "qwen3_vl_moe": qwen3_vl_moe,
    "llava": llava,
    "llava_next": llava_next,
    "llava_onevision": llava_onevision,
    "paligemma": paligemma,
    "gemma3_mm": gemma3_mm,
    "idefics3": idefics3,
    "smolvlm": smolvlm,
    "idefics2": idefics2,
    "mllama": mllama,
    "internvl": internvl,
    "mistral3": mistral3,
    "pixtral_llava": pixtral_llava,
    "aria": aria,
    "florence2": florence2,
    "blip2": blip2,
    "kosmos2": kosmos2,
    "qwen2_audio": qwen2_audio,
    "voxtral": voxtral,
    "granite_speech": granite_speech,
    "whisper": whisper,
    "wav2vec2": wav2vec2,
    "clip": clip,
    "siglip": siglip,
    "owlvit": owlvit,
    "detr": detr,
    "layoutlmv3": layoutlmv3,
    "mixtral": mixtral,
    "mamba2": mamba2,
    "jamba": jamba,
    "falcon_h1": falcon_h1,
}
"""Builders by name."""
