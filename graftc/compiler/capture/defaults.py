"""The default inputs with which a model is captured if the caller gives no examples.

They are inferred from the names of ``forward``'s parameters and from sizes in the config, never from the model's type.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from graftc.compiler.capture.interface import declared, dtype_of, parameters
from graftc.compiler.capture.past import has_encoder
from graftc.compiler.capture.signature import BATCH, SEQUENCE, TARGET, Axis
from graftc.specs.errors.diagnostics import GraftError

ROW_INPUTS = "graftc_row_inputs"
"""Name of the model attribute that lists the inputs, added by graftc, that hold one integer per row."""

_MASKED = ("input_ids", "inputs_embeds")
_NESTED = ("vision_config", "audio_config", "encoder", "backbone_config")
_FRAMES = 12
"""Number of frames that raw audio should yield: enough for the kernels that follow those of the feature extractor."""


def default_axes(model: nn.Module) -> list[Axis]:
    """Return the first signature of `default_signatures`."""
    return next(default_signatures(model))


def default_signatures(model: nn.Module) -> Iterator[list[Axis]]:
    """Yield the sets of inputs to try: first, the main input with its mask and the required parameters of ``forward``.

    For a model that takes text and images, a set with both follows; for an encoder-decoder model, a set without the
    decoder's inputs.

    Raises:
        GraftError: GC030 if the model's inputs cannot be inferred from its interface.
    """
    known = parameters(model)
    main = getattr(model, "main_input_name", None)
    names = [main] if main in known else []
    names += [name for name in (*_required(model), *getattr(model, ROW_INPUTS, ())) if name not in names]
    unknown = [name for name in names if name not in _AXES and name not in getattr(model, ROW_INPUTS, ())]
    if not names or unknown:
        raise _unknown(model, unknown)
    if names[0] in _MASKED and "attention_mask" in known:
        names.append("attention_mask")
    if has_encoder(model) and "decoder_input_ids" in known:
        names.append("decoder_input_ids")
    yield _ordered(model, names)
    if "input_ids" in names and "pixel_values" in known and "pixel_values" not in names:
        yield _ordered(model, [*names, "pixel_values"])
    if "decoder_input_ids" in names and "decoder_input_ids" not in _required(model):
        yield _ordered(model, [name for name in names if name != "decoder_input_ids"])


def _unknown(model: nn.Module, names: list[str]) -> GraftError:
    what = f"the input {names[0]!r}" if names else "the inputs"
    return GraftError(
        "GC030",
        f"{what} of {type(model).__name__} cannot be inferred from its interface",
        hint="pass example_inputs={name: tensor} to graftc.compile; on the command line, a callable may return "
        "(model, example_inputs)",
    )


def _required(model: nn.Module) -> list[str]:
    """Return the names of the parameters without a default."""
    by_name = declared(model)
    return [n for n in parameters(model) if by_name[n].default is inspect.Parameter.empty]


def _ordered(model: nn.Module, names: list[str]) -> list[Axis]:
    known, rows = parameters(model), getattr(model, ROW_INPUTS, ())
    ordered = sorted(set(names), key=known.index)
    return [Axis(n, torch.int64, (BATCH,)) if n in rows else _AXES[n](n, model) for n in ordered]


def _tokens(name: str, model: nn.Module) -> Axis:
    return Axis(name, torch.int64, (BATCH, TARGET if name.startswith("decoder_") else SEQUENCE))


def _embeddings(name: str, model: nn.Module) -> Axis:
    hidden = _setting(model, "hidden_size", "d_model", "n_embd")
    return Axis(name, dtype_of(model), (BATCH, TARGET if name.startswith("decoder_") else SEQUENCE, int(hidden)))


def _boxes(name: str, model: nn.Module) -> Axis:
    return Axis(name, torch.int64, (BATCH, SEQUENCE, 4))


def _pixels(name: str, model: nn.Module) -> Axis:
    size = _setting(model, "image_size", default=224)
    if isinstance(size, dict):
        edge = size.get("shortest_edge", 224)
        size = (size.get("height", edge), size.get("width", edge))
    height, width = size if isinstance(size, list | tuple) else (size, size)
    channels = _setting(model, "num_channels", "in_channels", "in_chans", default=3)
    frames = _setting(model, "num_frames", default=None)
    image = (int(channels), int(height), int(width))
    return Axis(name, dtype_of(model), (BATCH, *image) if frames is None else (BATCH, int(frames), *image))


def _features(name: str, model: nn.Module) -> Axis:
    """Return the axes of spectrograms: mel bins by a fixed number of frames, or frames by features.

    The first form is used if two frames make up one position.
    """
    bins, positions = _setting(model, "num_mel_bins", default=None), _setting(model, "max_source_positions", default=0)
    per_frame = _setting(model, "input_feat_per_channel", "feature_projection_input_dim", default=None)
    if bins is not None and per_frame is None and positions:
        return Axis(name, dtype_of(model), (BATCH, int(bins), 2 * int(positions)))
    width = per_frame if per_frame is not None else bins if bins is not None else 80
    return Axis(name, dtype_of(model), (BATCH, SEQUENCE, int(width)))


def _samples(name: str, model: nn.Module) -> Axis:
    """Return the axes of raw audio, long enough for the strided convolutions; or of a spectrogram of fixed length."""
    length, bins = _setting(model, "max_length", default=None), _setting(model, "num_mel_bins", default=None)
    if length and bins:
        return Axis(name, dtype_of(model), (BATCH, int(length), int(bins)))
    strides = _setting(model, "conv_stride", default=(320,))
    kernels = _setting(model, "conv_kernel", default=(400,))
    size = _FRAMES
    for stride, kernel in zip(reversed(list(strides)), reversed(list(kernels)), strict=False):
        size = (size - 1) * stride + kernel
    return Axis(name, dtype_of(model), (BATCH, size if size > _FRAMES else _FRAMES * math.prod(strides)))


_MISSING = object()


def _setting(model: nn.Module, *names: str, default: Any = _MISSING) -> Any:
    """Return the first of several settings that is present in the config or in its image or audio part.

    Raises:
        GraftError: GC030 if none is present and there is no default.
    """
    config = getattr(model, "config", None)
    for part in (config, *(getattr(config, name, None) for name in _NESTED)):
        for name in names:
            value = getattr(part, name, None)
            if value is not None:
                return value
    if default is _MISSING:
        raise _unknown(model, [])
    return default


_AXES: dict[str, Callable[[str, nn.Module], Axis]] = {
    **dict.fromkeys(
        (
            "input_ids",
            "attention_mask",
            "token_type_ids",
            "position_ids",
            "decoder_input_ids",
            "decoder_attention_mask",
        ),
        _tokens,
    ),
    "inputs_embeds": _embeddings,
    "decoder_inputs_embeds": _embeddings,
    "bbox": _boxes,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _samples,
}
