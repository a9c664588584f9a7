"""Recognise PEFT adapters and the folders that graftc wrote, which are those that ``force`` may replace."""

from __future__ import annotations

from pathlib import Path

from graftc.runtime.artifact.manifest import MANIFEST
from graftc.specs.foreign.config import CONFIG

RECORD = "graftc.json"
"""The file in a merged model's folder that records the model's origin."""


def is_artifact(path: Path) -> bool:
    """Return whether a folder is an artifact or is empty."""
    return _holds(path, MANIFEST)


def is_merged(path: Path) -> bool:
    """Return whether a folder is a merged model that graftc wrote or is empty."""
    return _holds(path, RECORD)


def is_ours(path: Path) -> bool:
    """Return whether a folder is an artifact or a merged model that graftc wrote, or is empty."""
    return is_artifact(path) or is_merged(path)


def is_peft(path: Path) -> bool:
    """Return whether a folder looks like a PEFT adapter."""
    return (path / CONFIG).is_file() and not (path / MANIFEST).is_file()


def _holds(path: Path, name: str) -> bool:
    return path.is_dir() and ((path / name).is_file() or not any(path.iterdir()))
