"""Artifacts: compiled models on disk, as folders without pickles. Names are imported on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftc.runtime.artifact.read import Artifact as Artifact
    from graftc.runtime.artifact.read import open_artifact as open_artifact

__all__ = ["Artifact", "open_artifact"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("graftc.runtime.artifact.read"), name)
    raise AttributeError(f"module 'graftc.runtime.artifact' has no attribute {name!r}")
