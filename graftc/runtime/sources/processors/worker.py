"""A script that makes an example with a folder's processor in a separate process, with bounded time and memory.

`graftc.runtime.sources.processors.example` runs it; it imports nothing from graftc. Its arguments are the folder,
``image`` or ``audio``, and the file to write, with arrays by name in the format of `numpy.savez`. It prints one line of
JSON to stdout: null, or the reason why there is no file.
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np

_QUESTION = "What is this?"
_EDGE = 64
"""The width and height of the image, in pixels; processors resize it."""
_PIECES = ("do_image_splitting", "crop_to_patches", "do_pan_and_scan")
"""Settings that make image processors cut an image into several; one is enough here."""
_ROWS = 2
_SECONDS, _WAY_SECONDS = 60, 10
"""Limits in seconds of CPU time: for the whole process, and for one way of calling a processor."""
_MEMORY, _FILE = 6 * 2**30, 2**28


def main(folder: str, kind: str, file: str) -> str | None:
    """Write an example and return None, or return the reason why there is no example."""
    _limit()
    try:
        np.savez(file, **_arrays(folder, kind))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


def _limit() -> None:
    with suppress(ImportError):  # Windows has no limits
        import resource

        limits = {resource.RLIMIT_CPU: _SECONDS, resource.RLIMIT_DATA: _MEMORY, resource.RLIMIT_FSIZE: _FILE}
        for what, most in limits.items():
            with suppress(ValueError, OSError):  # a lower limit is already set
                resource.setrlimit(what, (most, most))


def _arrays(folder: str, kind: str) -> dict[str, Any]:
    from transformers import AutoProcessor

    auto: Any = AutoProcessor
    processor: Any = auto.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    images = getattr(processor, "image_processor", None)
    for setting in _PIECES:
        if hasattr(images, setting):
            setattr(images, setting, False)
    failed: Exception | None = None
    for way in _ways(processor, kind):
        try:
            batch = _in_time(way)
        except Exception as error:
            failed = failed or error
            continue
        return {name: value.numpy() for name, value in batch.items() if hasattr(value, "numpy")}
    raise failed or TypeError(f"{type(processor).__name__} does not accept {kind}")


def _in_time(way: Callable[[], Any]) -> Any:
    """Return the result of a call.

    Raises:
        TimeoutError: if it takes too long.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"it takes more than {_WAY_SECONDS} seconds")

    if not hasattr(signal, "setitimer"):
        return way()
    signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, _WAY_SECONDS)
    try:
        return way()
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _ways(processor: Any, kind: str) -> Iterator[Callable[[], Any]]:
    """Yield the calls that processors may accept, starting with that of the chat template."""
    shown = _image() if kind == "image" else _sound(processor)
    if isinstance(getattr(processor, "chat_template", None), str):
        yield lambda: _chat(processor, kind, shown)
    token = getattr(processor, f"{kind}_token", None)
    marked = [f"{token}\n{_QUESTION}" if isinstance(token, str) else _QUESTION] * _ROWS
    given = "images" if kind == "image" else "audio"
    options = {"return_tensors": "pt", "padding": True}
    yield lambda: processor(text=marked, **{given: [[shown]] * _ROWS}, **options)
    yield lambda: processor(text=marked, **{given: [shown] * _ROWS}, **options)


def _chat(processor: Any, kind: str, shown: Any) -> Any:
    content = [{"type": kind, kind: shown}, {"type": "text", "text": _QUESTION}]
    messages = [[{"role": "user", "content": content}]] * _ROWS
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    return processor.apply_chat_template(messages, processor_kwargs={"padding": True}, **options)


def _image() -> Any:
    from PIL import Image

    across = np.broadcast_to(np.linspace(0, 255, _EDGE).astype(np.uint8), (_EDGE, _EDGE))
    return Image.fromarray(np.stack([across, across.T, 255 - across], -1))


def _sound(processor: Any) -> Any:
    """Return a second of a sine wave."""
    rate = getattr(getattr(processor, "feature_extractor", None), "sampling_rate", 16000)
    return np.sin(np.arange(rate, dtype=np.float32) * 0.05)


if __name__ == "__main__":
    print("\n" + json.dumps(main(*sys.argv[1:])))
