"""References: what an artifact says of where its base is, and finding the base again."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import nn

from graftc.runtime.models import is_callable, load_model
from graftc.specs.diagnostics import GraftError

__all__ = ["Reference", "find_base"]


@dataclass(frozen=True)
class Reference:
    """Where a model came from.

    Attributes:
        kind: a transformers folder, a hub id, ``package.module:callable``, or a folder inside of the artifact; None for
            a model made in Python.
        text: its path, id or name.
        revision: commit of a hub's repository.
    """

    kind: Literal["folder", "hub", "callable", "inside"] | None = None
    text: str | None = None
    revision: str | None = None

    @classmethod
    def of(cls, model: nn.Module, text: str | None = None) -> Reference:
        """The reference of a model.

        Args:
            model: a model; one that transformers loaded knows where from.
            text: the MODEL argument that it was loaded by, if there was one.
        """
        config = getattr(model, "config", None)
        text = text or getattr(config, "_name_or_path", None)
        if not text:
            return cls()
        if is_callable(text):
            return cls("callable", text)
        folder = Path(text).expanduser()
        if folder.is_dir():
            return cls("folder", os.path.abspath(folder))
        return cls("hub", text, getattr(config, "_commit_hash", None))

    def seen_from(self, folder: Path) -> str | None:
        """The path of a folder relative to another one; None for other kinds, or where there is none."""
        if self.kind == "inside":
            return self.text
        if self.kind != "folder" or self.text is None:
            return None
        try:
            return Path(os.path.relpath(self.text, folder)).as_posix()
        except ValueError:  # another drive
            return None


def find_base(reference: Reference, relative: str | None, artifact: Path) -> nn.Module:
    """Load the base that an artifact names. A folder that moved together with the artifact is found.

    Raises:
        GraftError: GC086 where it is not there, or where loading it would run code that the artifact names; GC032 where
            it is there and cannot be loaded.
    """
    hint = "name the base: --model MODEL, or graftc.load(path, model=...)"
    if reference.kind is None or reference.text is None:
        raise GraftError("GC086", f"{artifact} does not say where its base is: it was compiled from Python", hint=hint)
    if reference.kind == "callable":
        message = f"{artifact} was compiled from {reference.text}, and no code is run because an artifact names it"
        raise GraftError("GC086", message, hint=f"say so yourself: --model {reference.text}")
    if reference.kind == "hub":
        return load_model(reference.text, revision=reference.revision)
    stated = Path(reference.text) if reference.kind == "folder" else None
    for place in (stated, artifact / relative if relative is not None else None):
        if place is not None and (place / "config.json").is_file():
            return load_model(os.path.normpath(place))
    raise GraftError("GC086", f"the base of {artifact} is not at {reference.text}", hint=hint)
