"""Artifacts: a compiled model on disk as a folder without pickle. Names load when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graftc.runtime.artifact.load import load as load
    from graftc.runtime.artifact.read import Artifact as Artifact
    from graftc.runtime.artifact.read import open_artifact as open_artifact
    from graftc.runtime.artifact.write import save as save

_HOME = {"load": "load", "Artifact": "read", "open_artifact": "read", "save": "write"}

__all__ = [*_HOME]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"graftc.runtime.artifact.{_HOME[name]}"), name)
    raise AttributeError(f"module 'graftc.runtime.artifact' has no attribute {name!r}")
