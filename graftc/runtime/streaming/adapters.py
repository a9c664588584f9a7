"""Which kind of adapter a folder holds, and where its base is."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from graftc.runtime.artifact.places import is_peft
from graftc.runtime.artifact.read import Artifact, open_artifact
from graftc.runtime.streaming.peft import base_named_by, peft_updates
from graftc.runtime.streaming.sources import artifact_updates
from graftc.runtime.streaming.update import AdapterUpdates
from graftc.runtime.tensors.folder import TensorFolder
from graftc.specs.errors.diagnostics import GraftError

__all__ = ["read_updates"]

Made = Callable[[TensorFolder], AdapterUpdates]


def read_updates(path: Path, base: Path | None) -> tuple[Path, Made]:
    """The base's folder, and what makes the updates of its checkpoint.

    Args:
        path: the adapter's folder.
        base: the base's folder; None where the adapter is to say.

    Raises:
        GraftError: GC080 where there is no adapter, GC086 where the base is not known.
    """
    if is_peft(path):
        found = base or base_named_by(path)
        if found is None:
            hint = "name the base's folder: --model FOLDER"
            raise GraftError("GC086", f"{path} names no base that is in a folder here", hint=hint)
        return found, lambda checkpoint: peft_updates(path, checkpoint)
    artifact = open_artifact(path)
    return (base or _base_of(artifact)), lambda checkpoint: artifact_updates(artifact, checkpoint)


def _base_of(artifact: Artifact) -> Path:
    """Where an artifact says that its base is.

    Raises:
        GraftError: GC086.
    """
    place = artifact.manifest.base.place
    hint = "name its folder: --model FOLDER"
    if place.kind not in ("folder", "inside") or place.text is None:
        raise GraftError("GC086", f"the base of {artifact.path} is not a folder", hint=hint)
    stated = Path(place.text) if place.kind == "folder" else None
    for found in (stated, None if place.relative is None else artifact.path / place.relative):
        if found is not None and (found / "config.json").is_file():
            return Path(os.path.normpath(found))
    raise GraftError("GC086", f"the base of {artifact.path} is not at {place.text}", hint=hint)
