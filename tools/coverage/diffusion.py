"""Transformers and UNets of diffusers, shrunken by the names of their options, with inputs found by trying.

An option keeps its default unless its name shows that it is a number of layers or heads, or a width. The inputs that a
forward method names are tried in all shapes that such an input may have, the likeliest first.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from graftc.testing.compare import outputs_of
from tools.coverage.lookup import floats

ROWS, WORDS, SIDE, FRAMES = 2, 6, 8, 4
PARAMETERS = 60_000_000
TRIES = 3000

LAYERS = re.compile(
    r"(num|n)_(\w*_)?(layers|blocks|refiner_layers|dit_blocks)$|^(depth|num_layers\w*|layers_per_block)$"
)
HEADS = re.compile(r"num_(\w*_)?heads$|^(n_heads|num_heads|num_query_heads)$")
WIDTHS = re.compile(
    r"(caption|text|joint|cross|pooled|context|encoder_hid|cond|ff|ffn|time_embed|time|model|embed\w*)_?\w*"
    r"(dim|size|channels)$|^(ffn?_dim|intermediate_size|hidden_size|inner_dim|dim|width|cross_attention_dim)$"
)
SMALL_WIDTH = 64

VIDEO = {"sample_width": SIDE, "sample_height": SIDE, "sample_frames": 13, "max_text_seq_length": WORDS}
OPTIONS: dict[str, dict[str, Any]] = {
    "ChromaTransformer2DModel": {"approximator_hidden_dim": 64, "approximator_layers": 2},
    "LatteTransformer3DModel": {
        "in_channels": 4, "patch_size": 2, "sample_size": 8, "video_length": 4, "caption_channels": 64,
        "cross_attention_dim": 176, "norm_type": "ada_norm_single"},
    "CogVideoXTransformer3DModel": VIDEO,
    "ConsisIDTransformer3DModel": VIDEO,
    "DiTTransformer2DModel": {"sample_size": 8},
    "PixArtTransformer2DModel": {"sample_size": 8, "caption_channels": 64},
    "Transformer2DModel": {"in_channels": 32, "cross_attention_dim": 64},
    "TransformerTemporalModel": {"in_channels": 32},
    "UNet1DModel": {"extra_in_channels": 16},
    "UNet3DConditionModel": {"attention_head_dim": 16},
    "UNetMotionModel": {"num_attention_heads": 4, "motion_num_attention_heads": 4},
    "UNetSpatioTemporalConditionModel": {
        "addition_time_embed_dim": 32, "projection_class_embeddings_input_dim": 96,
        "num_attention_heads": (2, 2, 2, 2)},
    "WanVACETransformer3DModel": {"vace_layers": [0, 1]},
}  # fmt: skip
"""Options for classes that have no default for them, or whose defaults only fit their full size."""

BESIDE = (
    "encoder_hidden_states", "encoder_hidden_states_t5", "pooled_projections", "timestep", "timesteps", "img_ids",
    "txt_ids", "img_shapes", "guidance", "class_labels", "num_frames", "height", "width", "encoder_attention_mask",
    "encoder_hidden_states_mask", "image_embeds", "encoder_hidden_states_2", "encoder_attention_mask_2", "clip_text",
    "added_cond_kwargs", "controlnet_cond", "padding_mask",
)  # fmt: skip
"""Inputs with a default that some models need nevertheless."""


def classes() -> list[str]:
    """Return the names of the transformers and UNets in the installed diffusers."""
    diffusers: Any = importlib.import_module("diffusers")
    names = (name for name in dir(diffusers) if "Transformer" in name or "UNet" in name)
    return [name for name in names if isinstance(cls := getattr(diffusers, name), type) and hasattr(cls, "forward")]


def diffusion_model(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """Build a small random model of a class in eval mode, and inputs that it accepts.

    Raises:
        ValueError: no attempt succeeded; the message is the first reason.
    """
    cls = getattr(importlib.import_module("diffusers"), name)
    reason = ""
    for heads, width in ((2, SMALL_WIDTH), (4, 128), (0, 0)):
        try:
            model = _model(cls, heads, width)
            return model, _inputs(model)
        except Exception as error:
            reason = reason or f"{type(error).__name__}: {error}"
    raise ValueError(reason)


def _model(cls: Any, heads: int, width: int) -> nn.Module:
    options = _small(inspect.signature(cls.__init__).parameters, heads, width) | OPTIONS.get(cls.__name__, {})
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in cls(**options).parameters())
    if count > PARAMETERS:
        raise ValueError(f"{count / 1e6:.0f} million parameters even when shrunken")
    torch.manual_seed(0)
    model: nn.Module = cls(**options).eval()
    return model


def _small(known: Mapping[str, inspect.Parameter], heads: int, width: int) -> dict[str, Any]:
    defaults = {name: parameter.default for name, parameter in known.items()}
    options: dict[str, Any] = {}
    size = next((defaults[n] for n in ("attention_head_dim", "head_dim") if isinstance(defaults.get(n), int)), 0)
    before = next((value for name, value in defaults.items() if HEADS.search(name) and isinstance(value, int)), 0)
    axes = (value for name, value in defaults.items() if re.search(r"(axes|rope).*dim", name))
    rotary = sum(next((value for value in axes if isinstance(value, tuple | list)), ()))
    for name, value in defaults.items():
        if isinstance(value, bool) or value is None or value is inspect.Parameter.empty:
            continue
        if isinstance(value, int):
            if LAYERS.search(name):
                options[name] = min(value, 2)
            elif heads and HEADS.search(name) and value > heads:
                options[name] = heads
            elif heads and rotary and before and value == rotary * before:
                options[name] = rotary * min(heads, before)
            elif heads and size and before and value == size * before:
                options[name] = size * min(heads, before)
            elif width and WIDTHS.search(name) and value > width:
                options[name] = width
        elif isinstance(value, tuple | list) and name in ("block_out_channels", "num_layers", "depths"):
            small = [32 * (i + 1) for i in range(len(value))] if "channels" in name else [min(v, 2) for v in value]
            options[name] = tuple(small)
    return options


def _inputs(model: nn.Module) -> dict[str, Any]:
    config = dict(model.config)  # type: ignore[arg-type]
    known = inspect.signature(model.forward).parameters
    required = [n for n, p in known.items() if p.default is inspect.Parameter.empty and p.kind is not p.VAR_KEYWORD]
    optional = [n for n in BESIDE if n in known and n not in required]
    if not config.get("guidance_embeds"):
        optional = [n for n in optional if n != "guidance"]
    reason = ""
    for names in _selections(required, optional):
        choices = [_choices(name, config) for name in names]
        if not all(choices):
            reason = reason or f"no value for {next(n for n, c in zip(names, choices, strict=True) if not c)} is known"
            continue
        places = itertools.product(*(range(len(values)) for values in choices))
        for place in itertools.islice(sorted(places, key=sum), TRIES):
            inputs = {name: values[i] for name, values, i in zip(names, choices, place, strict=True)}
            try:
                outputs_of(model, inputs)
                return inputs
            except Exception as error:
                reason = reason or f"forward: {type(error).__name__}: {error}"
    raise ValueError(reason)


def _selections(required: Sequence[str], beside: Sequence[str]) -> Iterator[list[str]]:
    """Yield the inputs to pass: without rare ones, then with more and more of them, then the required ones alone."""
    rare = ("class_labels", "encoder_hidden_states_2", "encoder_attention_mask_2", "added_cond_kwargs", "image_embeds")
    for without in ((*rare, "encoder_attention_mask"), rare, rare[1:], rare[3:], (), tuple(beside)):
        chosen = [*required, *(name for name in beside if name not in without)]
        yield chosen


def _choices(name: str, config: Mapping[str, Any]) -> list[Any]:
    if name in ("hidden_states", "sample", "x", "image_latents"):
        return _pictures(config)
    if re.search(r"^(encoder_hidden_states|text_bth|cap_feats|image_embeds|clip_text)", name) and "mask" not in name:
        words, layers = config.get("num_embeddings", WORDS), config.get("num_text_layers")
        texts = [floats(ROWS, words, width) for width in _widths(config)]
        return [value[:, :, None].expand(-1, -1, layers, -1).contiguous() for value in texts] if layers else texts
    if re.search(r"^(pooled_|proj_embedding|clip_text_pooled)", name):
        return [floats(ROWS, width) for width in _widths(config)]
    if re.search(r"(^|_)(timesteps?|timestep_r|sigma)$|^(t|guidance|timestep_ratio)$", name):
        fractions = torch.linspace(0.2, 0.8, ROWS)
        return [fractions, torch.arange(ROWS) + 3, fractions[:, None].expand(ROWS, FRAMES).contiguous()]
    if name == "padding_mask":
        return [torch.ones(1, 1, SIDE, SIDE)]
    if "mask" in name:
        return [torch.ones(ROWS, WORDS, dtype=torch.bool), torch.ones(ROWS, WORDS)]
    axes = len(config.get("axes_dims_rope") or config.get("axes_dim") or (1, 1, 1))
    sides: dict[str, list[Any]] = {
        "img_ids": [_positions(axes)],
        "txt_ids": [torch.zeros(WORDS, axes)],
        "img_shapes": [[[(1, 4, 4)]] * ROWS, [(1, 4, 4)] * ROWS],
        "class_labels": [torch.arange(ROWS)],
        "original_size": [torch.full((ROWS, 2), 64.0)],
        "target_size": [torch.full((ROWS, 2), 64.0)],
        "crop_coords": [torch.zeros(ROWS, 2)],
        "added_time_ids": [torch.ones(ROWS, 3)],
        "visual_rope_pos": [[torch.arange(n) for n in (FRAMES, SIDE // 2, SIDE // 2)]],
        "text_rope_pos": [torch.arange(WORDS)],
        "fps": [torch.full((ROWS,), 8)],
        "context_latents": _pictures(config),
        "position_ids": [_positions(axes), torch.cat([_positions(axes), torch.zeros(WORDS, axes)])],
        "added_cond_kwargs": [
            {"resolution": None, "aspect_ratio": None},
            {"text_embeds": floats(ROWS, 64), "time_ids": torch.ones(ROWS, 6)},
        ],
        "text_lens": [torch.full((ROWS,), WORDS)],
        "controlnet_cond": [floats(ROWS, 3, 8 * SIDE, 8 * SIDE)],
        "num_frames": [1],
        "height": [4],
        "width": [4],
    }
    return sides.get(name, [])


def _pictures(config: Mapping[str, Any]) -> list[Tensor]:
    fields = (
        "in_channels",
        "latent_channels",
        "in_dim",
        "in_visual_dim",
        "out_channels",
        "embedding_dim",
        "patch_size",
    )
    counts = [config[n] for n in fields if isinstance(config.get(n), int)] or [4]
    pictures = []
    for channels in dict.fromkeys(counts):
        pictures += [
            floats(ROWS, channels, SIDE, SIDE),
            floats(ROWS, 16, channels),
            floats(ROWS, channels, FRAMES, SIDE, SIDE),
            floats(ROWS, FRAMES, channels, SIDE, SIDE),
            floats(ROWS, FRAMES, SIDE, SIDE, channels),
            floats(ROWS, channels, 16),
            floats(ROWS, channels),
            floats(ROWS, channels, 32, 32),
            floats(ROWS, channels, 5, SIDE, SIDE),
            floats(ROWS, 16, 4 * channels),
        ]
    return pictures


def _widths(config: Mapping[str, Any]) -> list[int]:
    """Return the numbers in a config that may be the width of a text, those with telling names first."""
    numbers = {name: value for name, value in config.items() if isinstance(value, int) and value >= 8}
    named = [
        value
        for name, value in numbers.items()
        if re.search(r"text|caption|joint|cross|context|pooled|embed|cap_", name)
    ]
    return list(dict.fromkeys([*named, *(v for n, v in numbers.items() if re.search(r"dim|size|channels|width", n))]))


def _positions(axes: int) -> Tensor:
    """Return the rows and columns of a picture of 4 x 4."""
    positions = torch.zeros(16, axes)
    positions[:, -2], positions[:, -1] = torch.arange(16) // 4, torch.arange(16) % 4
    return positions
