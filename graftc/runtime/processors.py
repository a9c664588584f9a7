"""An example call of a model that reads text with images or sound, made by the processor that lies beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from graftc.compiler.capture.interface import device_of, dtype_of, parameters
from graftc.runtime.models import local_folder, quiet_transformers
from graftc.runtime.templates.bounded import require_bounded
from graftc.runtime.tensors.foreign_folders import require_regular_files
from graftc.specs.errors.diagnostics import GraftError, first_line, warn

__all__ = ["processor_example"]

_FILES = ("processor_config.json", "preprocessor_config.json")
_KINDS = {"pixel_values": "image", "input_features": "audio", "input_values": "audio"}
"""What an input beside a text is made of, as chat templates call it."""
_QUESTION = "What is this?"
_EDGE = 64
"""Pixels of the image's sides; processors resize."""
_PIECES = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")
"""Settings of image processors that cut an image into several: one is enough here."""
_ROWS = 2


def processor_example(model: nn.Module) -> dict[str, Any] | None:
    """Make a call of two rows, each a text with an image or a sound, by the processor in a model's folder.

    How many tokens of a text an image takes is in no model's interface; its processor knows. No code of the folder is
    run, and its chat template is tried in a process of its own first. A processor that fails causes a warning.

    Returns:
        Tensors by name on the model's device, floating-point ones in its dtype. None for a model that reads text alone
        or images alone, for one on the meta device, which could not be run on them, and where there is no processor
        or it failed.
    """
    folder, known, device = local_folder(model), parameters(model), device_of(model)
    kind = next((kind for name, kind in _KINDS.items() if name in known), None)
    if kind is None or "input_ids" not in known or folder is None or device.type == "meta":
        return None
    if not any((folder / name).is_file() for name in _FILES):
        return None
    try:
        inputs = _inputs(folder, kind)
    except Exception as error:
        reason = error.message if isinstance(error, GraftError) else first_line(error)
        message = f"the processor in {str(folder)!r} makes no example of text with {kind}: {reason}"
        warn("GC030", message, hint="show a batch: example_inputs={name: tensor}")
        return None
    dtype, wanted = dtype_of(model), {name: tensor for name, tensor in inputs.items() if name in known}
    return {name: tensor.to(device, dtype if tensor.is_floating_point() else None) for name, tensor in wanted.items()}


def _inputs(folder: Path, kind: str) -> dict[str, Tensor]:
    from transformers import AutoProcessor

    auto: Any = AutoProcessor
    require_regular_files(folder, "GC030")
    failed: Exception | None = None
    with quiet_transformers():
        processor: Any = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        images = getattr(processor, "image_processor", None)
        for setting in _PIECES:
            if hasattr(images, setting):
                setattr(images, setting, False)
        for way in _ways(processor, kind):
            try:
                batch = way()
            except Exception as error:
                failed = failed or error
                continue
            return {name: value for name, value in batch.items() if isinstance(value, Tensor)}
    raise failed or TypeError(f"{type(processor).__name__} takes no {kind}")


def _ways(processor: Any, kind: str) -> Iterator[Callable[[], Any]]:
    """The calls that processors take, the chat template's first."""
    shown = _image() if kind == "image" else _sound(processor)
    template = getattr(processor, "chat_template", None)
    if isinstance(template, str):
        yield lambda: _chat(processor, template, kind, shown)
    token = getattr(processor, f"{kind}_token", None)
    marked = [f"{token}\n{_QUESTION}" if isinstance(token, str) else _QUESTION] * _ROWS
    given = "images" if kind == "image" else "audio"
    options = {"return_tensors": "pt", "padding": True}
    yield lambda: processor(text=marked, **{given: [[shown]] * _ROWS}, **options)
    yield lambda: processor(text=marked, **{given: [shown] * _ROWS}, **options)


def _chat(processor: Any, template: str, kind: str, shown: Any) -> Any:
    def asking(value: Any) -> list[dict[str, Any]]:
        """A conversation of one message about an image or a sound."""
        content = [{"type": kind, kind: value}, {"type": "text", "text": _QUESTION}]
        return [{"role": "user", "content": content}]

    tokens = processor.tokenizer.special_tokens_map
    require_bounded(template, asking(kind), {**tokens, "add_generation_prompt": True})
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template([asking(shown)] * _ROWS, processor_kwargs={"padding": True}, **options)


def _image() -> Any:
    from PIL import Image

    across = np.broadcast_to(np.linspace(0, 255, _EDGE).astype(np.uint8), (_EDGE, _EDGE))
    return Image.fromarray(np.stack([across, across.T, 255 - across], -1))


def _sound(processor: Any) -> Any:
    """A second of a sine wave."""
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 16000)
    return np.sin(np.arange(rate, dtype=np.float32) * 0.05)
