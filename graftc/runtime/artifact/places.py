"""Which folders graftc wrote, so that ``force`` may replace them, and which are adapters of PEFT's. No torch."""

from __future__ import annotations

from pathlib import Path

from graftc.runtime.artifact.manifest import MANIFEST
from graftc.specs.foreign.config import CONFIG

__all__ = ["RECORD", "is_artifact", "is_merged", "is_ours", "is_peft"]

RECORD = "graftc.json"
"""What the folder of a merged model says of where it comes from."""


def is_artifact(path: Path) -> bool:
    """An artifact, or an empty folder."""
    return _holds(path, MANIFEST)


def is_merged(path: Path) -> bool:
    """A merged model of graftc's, or an empty folder."""
    return _holds(path, RECORD)


def is_ours(path: Path) -> bool:
    """Either."""
    return is_artifact(path) or is_merged(path)


def is_peft(path: Path) -> bool:
    """Whether a folder looks like an adapter of PEFT's."""
    return (path / CONFIG).is_file() and not (path / MANIFEST).is_file()


def _holds(path: Path, name: str) -> bool:
    return path.is_dir() and ((path / name).is_file() or not any(path.iterdir()))
