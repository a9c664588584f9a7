"""Example inputs of a model, derived from its interface."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import declared
from tools.coverage.images_in_text import texts_with_images
from tools.coverage.lookup import find, floats, number, vocabulary

BATCH, SEQUENCE, TARGET = 3, 7, 5
SAMPLES = (6400, 16000)
PATCHES = 4
FRAMES = (64, 128, 300)

Inputs = dict[str, Tensor]


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs by name to try: the main input with its mask, then with more of the interface's inputs."""
    yield from texts_with_images(model)
    known = _arguments(model)
    main = str(getattr(model, "main_input_name", "input_ids"))
    required = [n for n, p in known.items() if p.default is inspect.Parameter.empty and n != main]
    for value in _main(model, main):
        base = {main: value} if main in known else {}
        sides = [n for n in required if n in _SIDES]
        decoder = [
            n for n in ("decoder_input_ids",) if n in known and getattr(model.config, "is_encoder_decoder", False)
        ]
        mask = (
            ["attention_mask"]
            if "attention_mask" in known and value.dim() == 2 and not value.is_floating_point()
            else []
        )
        optional = [n for n in _OPTIONAL if n in known and n != main]
        tried: set[tuple[str, ...]] = set()
        for names in (mask + sides + decoder, mask + sides, sides + decoder, sides, mask + sides + decoder + optional):
            chosen = tuple(dict.fromkeys(names))
            if chosen not in tried:
                tried.add(chosen)
                yield _ordered(base | {n: _SIDES[n](model.config, value) for n in chosen}, known)


def running(model: nn.Module) -> tuple[Inputs | None, str]:
    """Return the first inputs that the model accepts in eval mode, or the reason why the likeliest ones fail."""
    reason = ""
    for inputs in candidates(model):
        try:
            with torch.no_grad():
                model(**inputs)
            return inputs, ""
        except Exception as error:
            reason = reason or f"forward: {type(error).__name__}: {error}"
    return None, reason or "no input of it is known"


def _arguments(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {n: p for n, p in declared(model).items() if p.kind in kinds}


def _ordered(inputs: Inputs, known: Mapping[str, Any]) -> Inputs:
    return {name: inputs[name] for name in known if name in inputs}


def _main(model: nn.Module, name: str) -> Iterator[Tensor]:
    config = model.config
    if name in ("input_ids", "decoder_input_ids", "inputs"):
        yield _ids(config, _length(config))
        if name == "inputs":
            yield from (floats(BATCH, samples) for samples in SAMPLES)
            yield from _images(config)
    elif name in ("pixel_values", "pixel_values_videos"):
        yield from _images(config)
        yield floats(BATCH, PATCHES, (number(config, "num_channels") or 3) * (number(config, "patch_size") or 1) ** 2)
        frames = number(config, "num_frames", "frames_per_clip") or 4
        yield from (floats(BATCH, frames, *image.shape[1:]) for image in _images(config))
    elif name == "past_values":
        length = number(config, "context_length") or 64
        yield floats(BATCH, length, number(config, "num_input_channels") or 1)
        yield floats(BATCH, length)
    elif name == "flattened_patches":
        yield floats(BATCH, PATCHES, number(config, "patch_embed_hidden_size") + 2).abs()
    elif name == "input_values":
        mels = number(config, "num_mel_bins")
        if mels:
            yield floats(BATCH, number(config, "max_length") or FRAMES[0], mels)
        for samples in SAMPLES:
            yield floats(BATCH, samples)
            yield floats(BATCH, 1, samples)
    elif name == "input_features":
        mels = (
            number(
                config,
                "feature_projection_input_dim",
                "num_mel_bins",
                "input_feat_per_channel",
                "feature_size",
                "input_dim",
                "input_size",
            )
            or 80
        )
        positions = number(config, "max_source_positions")
        if positions:
            yield floats(BATCH, mels, 2 * positions)
        for frames in FRAMES:
            yield floats(BATCH, frames, mels)
            yield floats(BATCH, mels, frames)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                yield floats(BATCH, FRAMES[0], layer.in_features)
                break


def _images(config: Any) -> Iterator[Tensor]:
    channels = number(config, "num_channels", "in_channels", "in_chans") or 3
    known = find(config, "image_size", "crop_size", "input_size")
    sizes = [known if isinstance(known, list | tuple) else (known, known)] if known else []
    for height, width in (*sizes, (64, 64), (224, 224)):
        yield floats(BATCH, channels, height, width)


def _length(config: Any) -> int:
    """Return the number of tokens in a text: the size of a table of positions along several axes, if there is one."""
    axes = getattr(config, "axial_pos_shape", None)
    return math.prod(axes) if axes else SEQUENCE


def _ids(config: Any, length: int) -> Tensor:
    """Return tokens that are not special, 3 to 20 or as the vocabulary allows, and the end of the sequence."""
    generator = torch.Generator().manual_seed(1)
    top = min(vocabulary(config), 20)
    ids = torch.randint(min(3, top - 1), top, (BATCH, length), generator=generator)
    end = number(config, "eos_token_id")
    ids[:, -1] = end if 0 < end < vocabulary(config) else ids[:, -1]
    return ids


def _boxes(config: Any, main: Tensor) -> Tensor:
    corner = torch.arange(4).clamp(max=3)
    return corner.expand(*main.shape[:2], 4).contiguous()


_SIDES: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "attention_mask": lambda config, main: torch.ones_like(main),
    "decoder_input_ids": lambda config, main: _ids(config, TARGET),
    "bbox": _boxes,
    "input_ids": lambda config, main: _ids(config, SEQUENCE),
    "pixel_values": lambda config, main: next(_images(config)),
    "image": lambda config, main: next(_images(config)),
    "token_type_ids": lambda config, main: torch.zeros_like(main),
    "image_attention_mask": lambda config, main: torch.ones(*main.shape[:2], 1, dtype=torch.int64),
    "pixel_attention_mask": lambda config, main: torch.ones(BATCH, PATCHES, dtype=torch.int64),
    "spatial_shapes": lambda config, main: torch.full((BATCH, 2), 2),
    "input_features": lambda config, main: floats(BATCH, number(config, "num_mel_bins") or 80, 8 * SEQUENCE),
}
"""Functions that make the inputs beside the main one, by name."""

_OPTIONAL = (
    "bbox",
    "pixel_attention_mask",
    "spatial_shapes",
    "input_features",
    "pixel_values",
    "image",
    "token_type_ids",
    "decoder_input_ids",
    "input_ids",
)
"""Inputs with a default that some models need nevertheless."""
