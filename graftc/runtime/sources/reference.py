"""References: records in an artifact that say where its base is. Does not import torch.

A reference in a file is data: a folder or a hub id is loaded only as the kind that the reference declares. Nothing that
a file names is imported or called.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from graftc.compat.transformers import commit_of, path_of
from graftc.specs.errors.arguments import absolute_path

if TYPE_CHECKING:
    from torch import nn


Kind: TypeAlias = Literal["folder", "hub", "callable", "inside"]
"""A transformers folder, a hub id, ``package.module:callable``, or a folder inside the artifact."""

_CALLABLE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*(\.[A-Za-z_]\w*)*")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9][\w./-]{0,95}", re.ASCII)
MOST_LABELS = 2**16
"""The maximum number of class names in a file."""

_INSIDE = re.compile(r"[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def is_callable(text: str) -> bool:
    """Return whether a MODEL argument has the form ``package.module:callable``."""
    return _CALLABLE.fullmatch(text) is not None


def is_hub_id(text: str) -> bool:
    """Return whether a text has the form of a hub id: ``name`` or ``owner/name``."""
    return _HUB_ID.fullmatch(text) is not None and ".." not in text and "--" not in text


@dataclass(frozen=True)
class Built:
    """The choices made when building a model from a folder whose config leaves them open.

    Attributes:
        architecture: its class.
        labels: names of the classes that it distinguishes; None if its config has none.
        dtype: its dtype, such as ``"float32"``.
        settings: plain values of its config, by name.
    """

    architecture: str
    labels: tuple[str, ...] | None
    dtype: str
    settings: Mapping[str, bool | int | float | str]


@dataclass(frozen=True)
class Reference:
    """A model's source: a folder, a hub id, or a callable.

    Attributes:
        kind: the kind of source; None for a model created in Python.
        text: an absolute path, an id or a name.
        revision: commit of a hub repository.
        relative: the folder's path relative to an artifact, with ``/``; None if there is none.
        built: how to build the model from its source.
    """

    kind: Kind | None = None
    text: str | None = None
    revision: str | None = None
    relative: str | None = None
    built: Built | None = None

    @classmethod
    def of(cls, model: nn.Module, text: str | None = None) -> Reference:
        """Return the reference to a model.

        Args:
            model: the model; if transformers loaded it, its config records its source.
            text: the MODEL argument with which it was loaded, if there was one.
        """
        config = getattr(model, "config", None)
        text = text or path_of(config)
        if not isinstance(text, str) or not text:
            return cls()
        if is_callable(text):
            return cls("callable", text)
        folder = Path(text).expanduser()
        reference = cls("folder", str(absolute_path(folder)))
        if not folder.is_dir():
            reference = cls("hub", text, commit_of(config))
        return reference if reference.flaw() is None else cls()

    def seen_from(self, folder: Path) -> Reference:
        """Return this reference as recorded by an artifact in ``folder``."""
        relative = self.text if self.kind == "inside" else None
        if self.kind == "folder" and self.text is not None:
            try:
                relative = Path(os.path.relpath(self.text, folder)).as_posix()
            except ValueError:  # on another drive
                relative = None
        reference = replace(self, relative=relative)
        return reference if reference.flaw() is None else self

    def flaw(self) -> str | None:
        """Return a description of the part of this reference that graftc would not create; None if there is none."""
        text, relative = self.text, self.relative
        if self.kind is None:
            return None if text is relative is self.revision is None else "a reference to nothing"
        if text is None or not all(part is None or part.isprintable() for part in (text, relative)):
            return f"{text!r} as a place"
        fits = {
            "folder": os.path.isabs(text) and os.path.normpath(text) == text,
            "hub": is_hub_id(text),
            "callable": is_callable(text),
            "inside": _INSIDE.fullmatch(text) is not None,
        }
        if not fits[self.kind]:
            return f"{text!r} as a base of kind {self.kind}"
        if self.revision is not None and (self.kind != "hub" or not _REVISION.fullmatch(self.revision)):
            return f"the revision {self.revision!r}"
        fit = relative == text if self.kind == "inside" else relative is None or _is_relative(relative)
        return None if fit else f"{relative!r} as a path to its base"


def _is_relative(path: str) -> bool:
    """Return whether a path is relative, with ``/``, and normalised."""
    return not os.path.isabs(path) and "\\" not in path and Path(os.path.normpath(path)).as_posix() == path
