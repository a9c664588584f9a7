"""Find the files beside a model: its tokenizer, its chat template, its processors."""

from __future__ import annotations

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
    if origin is None:
        return []
    return [file for pattern in COMPANIONS for file in sorted(origin.glob(pattern)) if file.is_file()]
