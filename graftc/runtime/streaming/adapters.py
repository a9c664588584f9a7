"""Read adapters that graftc or peft wrote from their folders, and locate their bases."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from graftc.files.tensors.folder import TensorFolder
from graftc.runtime.artifact.places import is_peft
from graftc.runtime.artifact.read import Artifact, open_artifact
from graftc.runtime.streaming.peft import base_named_by, peft_updates
from graftc.runtime.streaming.sources import artifact_updates
from graftc.runtime.streaming.update import AdapterUpdates
from graftc.specs.errors.diagnostics import GraftError

Made = Callable[[TensorFolder], AdapterUpdates]


def read_updates(path: Path, base: Path | None) -> tuple[Path, Made]:
    """Return the base's folder, and a function that returns the adapter's updates to the base's checkpoint.

    Args:
        path: the adapter's folder.
        base: the base's folder; None for the folder that the adapter names.

    Raises:
        GraftError: GC080 if there is no adapter, GC086 if the base is not known.
    """
    if is_peft(path):
        folder = base or base_named_by(path)
        if folder is None:
            hint = "name the base's folder: --model FOLDER"
            raise GraftError("GC086", f"{path} names no base in a folder on this machine", hint=hint)
        return folder, lambda checkpoint: peft_updates(path, checkpoint)
    artifact = open_artifact(path)
    return (base or _base_of(artifact)), lambda checkpoint: artifact_updates(artifact, checkpoint)


def _base_of(artifact: Artifact) -> Path:
    """Return the folder that an artifact names as its base.

    Raises:
        GraftError: GC086 if it names no folder, or none that exists on this machine.
    """
    place = artifact.manifest.base.place
    hint = "name its folder: --model FOLDER"
    if place.kind not in ("folder", "inside") or place.text is None:
        raise GraftError("GC086", f"the base of {artifact.path} is not a folder", hint=hint)
    stated = Path(place.text) if place.kind == "folder" else None
    for candidate in (stated, None if place.relative is None else artifact.path / place.relative):
        if candidate is not None and (candidate / "config.json").is_file():
            return Path(os.path.normpath(candidate))
    raise GraftError("GC086", f"the base of {artifact.path} is not at {place.text}", hint=hint)
