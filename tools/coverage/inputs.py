"""Example inputs of a model, found from its interface: `candidates` lists what to try, best first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import declared

BATCH, SEQUENCE, TARGET = 3, 7, 5
SAMPLES = (6400, 16000)
PATCHES = 4
FRAMES = (64, 128, 300)

Inputs = dict[str, Tensor]


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """Inputs by name to try: the main input with its mask, then with more of what the interface offers."""
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
    """The first inputs that the model takes in eval mode, or why the likeliest ones fail."""
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
        yield _ids(config, SEQUENCE)
        if name == "inputs":
            yield from (_floats(BATCH, samples) for samples in SAMPLES)
            yield from _images(config)
    elif name == "pixel_values":
        yield from _images(config)
        yield _floats(BATCH, PATCHES, (_find(config, "num_channels") or 3) * (_find(config, "patch_size") or 1) ** 2)
    elif name == "input_values":
        mels = _find(config, "num_mel_bins")
        if mels:
            yield _floats(BATCH, _find(config, "max_length") or FRAMES[0], mels)
        for samples in SAMPLES:
            yield _floats(BATCH, samples)
            yield _floats(BATCH, 1, samples)
    elif name == "input_features":
        mels = (
            _find(
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
        positions = _find(config, "max_source_positions")
        if positions:
            yield _floats(BATCH, mels, 2 * positions)
        for frames in FRAMES:
            yield _floats(BATCH, frames, mels)
            yield _floats(BATCH, mels, frames)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                yield _floats(BATCH, FRAMES[0], layer.in_features)
                break


def _images(config: Any) -> Iterator[Tensor]:
    channels = _find(config, "num_channels", "in_channels", "in_chans") or 3
    known = _find_any(config, "image_size", "crop_size", "input_size")
    sizes = [known if isinstance(known, list | tuple) else (known, known)] if known else []
    for height, width in (*sizes, (64, 64), (224, 224)):
        yield _floats(BATCH, channels, height, width)


def _find_any(config: Any, *names: str) -> Any:
    """The first of these that the config or a sub-config has."""
    for name in names:
        value = getattr(config, name, None)
        if value and not hasattr(value, "to_dict"):
            return value
    for value in vars(config).values():
        if hasattr(value, "to_dict") and hasattr(value, "model_type") and (found := _find_any(value, *names)):
            return found
    return None


def _find(config: Any, *names: str) -> int:
    value = _find_any(config, *names)
    return value if isinstance(value, int) else 0


def _vocabulary(config: Any) -> int:
    return _find(config, "vocab_size", "decoder_vocab_size", "src_vocab_size") or 32


def _ids(config: Any, length: int) -> Tensor:
    """Tokens that no special id is among, 3 to 20 or what the vocabulary allows, and the end of the sequence."""
    generator = torch.Generator().manual_seed(1)
    top = min(_vocabulary(config), 20)
    ids = torch.randint(min(3, top - 1), top, (BATCH, length), generator=generator)
    end = _find(config, "eos_token_id")
    ids[:, -1] = end if 0 < end < _vocabulary(config) else ids[:, -1]
    return ids


def _floats(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(2))


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
    "pixel_attention_mask": lambda config, main: torch.ones(BATCH, PATCHES, dtype=torch.int64),
    "spatial_shapes": lambda config, main: torch.full((BATCH, 2), 2),
    "input_features": lambda config, main: _floats(BATCH, _find(config, "num_mel_bins") or 80, 8 * SEQUENCE),
}
"""Inputs beside the main one, by name."""

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
"""Inputs with a default that some models need all the same."""
