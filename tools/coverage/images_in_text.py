"""Example inputs of models that put the features of images or sounds into a text, derived from their interface.

The model itself says how many tokens an image takes: its ``get_image_features`` returns the features that the text
needs places for. So no table of models is needed, and a model that fits no rule is not built.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from graftc.compiler.capture.interface import declared
from tools.coverage.lookup import find, floats, number, vocabulary
from tools.coverage.shrink import VOCABULARY

ROWS = 3
WORDS = (7, 4, 9)
"""Tokens of text beside the image, row by row."""

GRIDS = (((4, 4), (4, 8), (8, 4)), ((2, 2), (2, 4), (4, 2)))
"""Patch grids of images, before merging, for models that take patches in a row; smaller ones if positions run out."""

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Medium:
    """A medium that a text can have places for.

    Attributes:
        features: the name of the method that returns the features.
        tokens: the fields of a config that may contain the token of a place.
        values: the names of the input, the likeliest first.
    """

    features: str
    tokens: tuple[str, ...]
    values: tuple[str, ...]


IMAGE = Medium(
    "get_image_features",
    ("image_token_id", "image_token_index", "image_patch_id", "media_placeholder_token_id"),
    ("pixel_values",),
)
AUDIO = Medium(
    "get_audio_features",
    ("audio_token_id", "audio_token_index", "image_token_id"),
    ("input_features", "input_values"),
)


def texts_with_images(model: nn.Module) -> Iterator[Inputs]:
    """Yield inputs to try for a model that takes a text with an image or a sound in every row; none for others."""
    known = declared(model)
    if "input_ids" not in known:
        return
    for medium in (IMAGE, AUDIO):
        name = next((n for n in medium.values if n in known), None)
        give = _features(model, medium.features)
        token = next((number(model.config, field) for field in medium.tokens if number(model.config, field)), 0)
        if "image_embeds_position_mask" in known:
            token = token or vocabulary(model.config) - 1
        if name is None or give is None or not token:
            continue
        for sides in _values(model, name, known):
            counts = _counts(give, sides)
            if counts is not None:
                yield from _texts(model, counts, token, sides, known)


def _features(model: nn.Module, name: str) -> Callable[..., Any] | None:
    for owner in (model, getattr(model, "model", None)):
        method: Callable[..., Any] | None = getattr(owner, name, None)
        if method is not None:
            return method
    return None


def _counts(give: Callable[..., Any], sides: Inputs) -> list[int] | None:
    """Return the number of places that each row's image takes; None if the model rejects these values."""
    taken = inspect.signature(give).parameters.values()
    names = {parameter.name for parameter in taken}
    every = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in taken)
    try:
        with torch.no_grad():
            output = give(**{name: value for name, value in sides.items() if every or name in names})
    except Exception:
        return None
    output = getattr(output, "pooler_output", output)
    if isinstance(output, Tensor):
        if output.dim() == 3 and output.shape[0] % ROWS == 0:
            return [output.shape[1] * output.shape[0] // ROWS] * ROWS
        total = output.shape[0] if output.dim() == 2 else 0
        return [total // ROWS] * ROWS if total and total % ROWS == 0 else None
    if isinstance(output, list | tuple) and len(output) % ROWS == 0 and all(isinstance(f, Tensor) for f in output):
        lengths = [f.reshape(-1, f.shape[-1]).shape[0] for f in output]
        each = len(output) // ROWS
        return [sum(lengths[row * each : (row + 1) * each]) for row in range(ROWS)]
    return None


def _texts(
    model: nn.Module, counts: Sequence[int], token: int, sides: Inputs, known: Mapping[str, Any]
) -> Iterator[Inputs]:
    """Yield texts with that many places, padded on the left, and the other inputs that the interface has for them."""
    config = model.config
    before = number(config, "vision_start_token_id", "image_start_token_id", "boi_token_id", "boi_token_index")
    after = number(config, "vision_end_token_id", "image_end_token_id", "eoi_token_id", "eoi_token_index")
    generator, top = torch.Generator().manual_seed(1), min(vocabulary(config), VOCABULARY)
    before, after = (0 if other == token else other for other in (before, after))
    rows = []
    for count, words in zip(counts, WORDS, strict=True):
        told = torch.randint(top // 4, top * 3 // 4, (words,), generator=generator).tolist()
        rows.append([1, *([before] if before else []), *([token] * count), *([after] if after else []), *told])
    longest = max(map(len, rows))
    for padded in (True, False):
        if not padded and len(set(map(len, rows))) > 1:
            rows = [row + [5] * (longest - len(row)) for row in rows]
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
        places = (ids == token).long()
        beside = {
            "input_ids": ids,
            "attention_mask": mask,
            "mm_token_type_ids": places,
            "token_type_ids": places,
            "image_embeds_position_mask": places,
            "decoder_input_ids": ids[:, -4:] if getattr(config, "is_encoder_decoder", False) else None,
        }
        chosen = {n: v for n, v in beside.items() if v is not None and n in known} | sides
        yield {name: chosen[name] for name in known if name in chosen}


def _values(model: nn.Module, name: str, known: Mapping[str, Any]) -> Iterator[Inputs]:
    """Yield values of images or sounds to try, with the inputs that describe their sizes; the likeliest come first."""
    config = model.config
    if name != "pixel_values":
        yield from _sounds(config, name, known)
        return
    if "qformer_input_ids" in known:
        for sides in _pictures(config, known):
            words = torch.full((ROWS, 6), 40)
            yield sides | {"qformer_input_ids": words, "qformer_attention_mask": torch.ones_like(words)}
    yield from _pictures(config, known)


def _pictures(config: Any, known: Mapping[str, Any]) -> Iterator[Inputs]:
    channels = number(config, "num_channels", "in_channels", "in_chans") or 3
    patch = number(config, "patch_size") or 14
    if any(grid in known for grid in ("image_grid_thw", "grid_thw", "image_grid_hw", "grid_thws")):
        yield from _patches_in_a_row(config, channels, patch, known)
    if "spatial_shapes" in known or "image_position_ids" in known or "pixel_position_ids" in known:
        yield from _patches_by_row(config, channels, patch, known)
    sizes = _sizes(config, patch)
    for height, width in sizes:
        pictures = floats(ROWS, channels, height, width)
        told: Inputs = {}
        if "image_sizes" in known:
            told["image_sizes"] = torch.tensor([[height, width]] * ROWS)
        if "num_crops" in known or "num_local_patches" in known:
            told |= {n: torch.ones(ROWS, dtype=torch.int64) for n in ("num_crops", "num_local_patches") if n in known}
        mask = torch.ones(ROWS, 1, height, width, dtype=torch.bool)
        five = {"pixel_values": pictures[:, None]}
        for option in (
            {"pixel_values": pictures} | told,
            {"pixel_values": pictures},
            five | told | ({"pixel_attention_mask": mask} if "pixel_attention_mask" in known else {}),
            # Tiles of each picture; the first is the whole picture.
            {"pixel_values": floats(ROWS, 2, channels, height, width)} | told,
            {"pixel_values": floats(ROWS, 3, channels, height, width)} | told,
            {"pixel_values": floats(ROWS, 5, channels, height, width)} | told,
        ):
            yield option
            for more in ("pixel_values_global", "high_res_pixel_values", "pixel_values_local"):
                if more in known:
                    yield option | {more: option["pixel_values"]}


def _sizes(config: Any, patch: int) -> list[tuple[int, int]]:
    size = find(config, "image_size", "crop_size", "input_size", "img_size")
    known = [(size, size)] if isinstance(size, int) else [tuple(size[-2:])] if isinstance(size, list | tuple) else []
    more = [(4 * patch, 4 * patch), (8 * patch, 8 * patch), (64, 64), (224, 224)]
    return list(dict.fromkeys([*known, *more]))


def _patches_in_a_row(config: Any, channels: int, patch: int, known: Mapping[str, Any]) -> Iterator[Inputs]:
    merge = max(number(config, "spatial_merge_size", "merge_size"), 2)
    for grids in GRIDS:
        yield from _rows_of_patches(
            config, [(h * merge // 2, w * merge // 2) for h, w in grids], merge, patch, channels, known
        )


def _rows_of_patches(
    config: Any, grids: Sequence[tuple[int, int]], merge: int, patch: int, channels: int, known: Mapping[str, Any]
) -> Iterator[Inputs]:
    area = channels * patch * patch
    total = sum(h * w for h, w in grids)
    frames = number(config, "temporal_patch_size") or 1
    grid = next(n for n in ("image_grid_thw", "grid_thw", "image_grid_hw", "grid_thws") if n in known)
    sides = {grid: torch.tensor([[1, h, w] if "t" in grid.rpartition("_")[2] else [h, w] for h, w in grids])}
    if "image_merge_sizes" in known:
        sides["image_merge_sizes"] = torch.full((len(grids),), merge)
    for values in dict.fromkeys((frames * area, area, 2 * area)):
        yield {"pixel_values": floats(total, values)} | sides
    yield {"pixel_values": floats(total, channels, patch, patch)} | sides


def _patches_by_row(config: Any, channels: int, patch: int, known: Mapping[str, Any]) -> Iterator[Inputs]:
    heights, widths = 6, 6
    count = heights * widths
    position = torch.stack(torch.meshgrid(torch.arange(widths), torch.arange(heights), indexing="xy"), -1).reshape(
        -1, 2
    )
    beside = {
        "spatial_shapes": torch.tensor([[heights, widths]] * ROWS),
        "pixel_attention_mask": torch.ones(ROWS, count, dtype=torch.int64),
        "image_position_ids": position.expand(ROWS, -1, -1).contiguous(),
        "pixel_position_ids": position.expand(ROWS, -1, -1).contiguous(),
    }
    yield {"pixel_values": floats(ROWS, count, channels * patch * patch)} | {
        n: v for n, v in beside.items() if n in known
    }


def _sounds(config: Any, name: str, known: Mapping[str, Any]) -> Iterator[Inputs]:
    bins = number(config, "num_mel_bins", "n_mels", "input_feat_per_channel", "feature_size", "input_dim") or 80
    positions = number(config, "max_source_positions")
    if name == "input_values":
        for samples in (6400, 16000):
            yield {name: floats(ROWS, samples)}
            yield {name: floats(ROWS, 1, samples)}
        return
    for frames in dict.fromkeys([*([2 * positions] if positions else []), 64, 128, 300]):
        for shape in ((ROWS, bins, frames), (ROWS, frames, bins)):
            values = {name: floats(*shape)}
            mask = torch.ones(ROWS, frames, dtype=torch.int64)
            masks = [n for n in ("feature_attention_mask", "input_features_mask") if n in known]
            if masks:
                yield values | {n: mask for n in masks}
                yield values | {n: mask.bool() for n in masks}
            yield values
