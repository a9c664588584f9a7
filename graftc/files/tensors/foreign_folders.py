"""Check folders of foreign origin before another library opens their files."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.regular_files import INDEX_BYTES, JSON_BYTES

TOKENIZER_BYTES = 2**27
"""Maximum size of a tokenizer file, in bytes."""
_SIZES = {
    ".json": JSON_BYTES,
    ".jinja": 2**20,
    ".txt": TOKENIZER_BYTES,
    ".model": TOKENIZER_BYTES,
    ".tiktoken": TOKENIZER_BYTES,
}
"""Maximum sizes of files that are read whole, by suffix."""
_LARGER = ("tokenizer.json", "vocab.json", "merges.json")
_READ = re.compile("config|token|vocab|index|merges|template|normalizer|emoji")
"""A pattern for names of JSON files that a library may read; other JSON files, such as a trainer's log or data, are not
opened."""
_INNER = ("additional_chat_templates",)
"""Subfolders that are read as well."""


def require_regular_files(folder: Path, code: str) -> None:
    """Refuse a folder with files that are not regular, such as pipes and devices, or that are too large to be read.

    Args:
        folder: the folder of a model, a tokenizer or an adapter.
        code: the code of the error.

    Raises:
        GraftError: with that code.
    """
    hint = "remove it from the folder"
    try:
        for path in _files(folder):
            state = _state(path)
            if state is None or stat.S_ISDIR(state.st_mode):
                continue
            if not stat.S_ISREG(state.st_mode):
                raise GraftError(code, f"{quoted(path)} is not a regular file", hint=hint)
            most = _most(path)
            if most is not None and state.st_size > most:
                raise GraftError(code, f"{quoted(path)} has {state.st_size:,} bytes, more than {most:,}", hint=hint)
    except OSError as error:
        raise GraftError(code, f"{quoted(folder)} cannot be read: {error.strerror or error}") from error


def _most(path: Path) -> int | None:
    """Return the maximum size of a file in bytes; None for a file that is not read in full."""
    if path.suffix == ".json" and not _READ.search(path.name):
        return None
    if path.name in _LARGER:
        return TOKENIZER_BYTES
    return INDEX_BYTES if path.name.endswith(".index.json") else _SIZES.get(path.suffix)


def _files(folder: Path) -> Iterator[Path]:
    for place in (folder, *(folder / name for name in _INNER)):
        if place.is_dir():
            with os.scandir(place) as entries:
                yield from (Path(entry.path) for entry in entries)


def _state(path: Path) -> os.stat_result | None:
    try:
        return path.stat()
    except OSError:  # a dangling link, which raises when it is read
        return None
