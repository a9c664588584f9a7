"""Find the files beside a model: its tokenizer, its chat template, its processors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from graftc.runtime.sources.models import local_folder

COMPANIONS = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken"),
    *("chat_template*", "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)
"""Patterns for files beside a model that its users need and that folding does not change."""


def companions_of_model(source: Any) -> list[Path]:
    """Return the files beside a model that its users need; none unless it was loaded from a folder."""
    origin = local_folder(source)
    return [] if origin is None else list(_companions(origin))


def _companions(origin: Path) -> Iterator[Path]:
    for pattern in COMPANIONS:
        yield from (file for file in sorted(origin.glob(pattern)) if file.is_file())
