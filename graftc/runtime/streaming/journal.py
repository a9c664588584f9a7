"""The journal of a merge: what has been done of it, so that a killed one goes on where it was.

A file counts as done once its line is on the disk, which is written after the file itself. When a merge is resumed,
every file is held against the digest in its line, and done again where they differ.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graftc.compiler.folding.certificate import SiteEvidence
from graftc.compiler.folding.retention import Retention
from graftc.runtime.artifact.write import file_digest

__all__ = ["Journal", "ShardDone"]


@dataclass(frozen=True)
class ShardDone:
    """A file that is done.

    Attributes:
        sha256: of what was written.
        untouched: how many tensors are the base's, bit for bit, whole or in all rows that were not folded.
        sites: the evidence for what was folded.
    """

    sha256: str
    untouched: int
    sites: tuple[SiteEvidence, ...]


class Journal:
    """Lines of JSON, one for each file that is done.

    Args:
        path: the journal's file.
        folder: where the files are.
    """

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder

    def done(self) -> dict[str, ShardDone]:
        """The files that are done, and are as they were written."""
        found: dict[str, ShardDone] = {}
        lines = self._path.read_text(encoding="utf-8").splitlines() if self._path.is_file() else []
        for line in lines:
            try:
                data: dict[str, Any] = json.loads(line)
                done = _read(data)
            except (ValueError, KeyError, TypeError):
                continue  # it was killed while it wrote this
            name = os.path.basename(data["file"])
            file = self._folder / name
            if file.is_file() and file_digest(file) == done.sha256:
                found[name] = done
        return found

    def add(self, name: str, done: ShardDone) -> None:
        """Note that a file is done, and lies on the disk."""
        data = {"file": name, **asdict(done)}
        line = json.dumps(data)
        check = hashlib.sha256(line.encode()).hexdigest()[:16]
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"check": check, **data}) + "\n")
            file.flush()
            os.fsync(file.fileno())


def _read(data: dict[str, Any]) -> ShardDone:
    check = data.pop("check")
    if hashlib.sha256(json.dumps(data).encode()).hexdigest()[:16] != check:
        raise ValueError("it has changed")
    return ShardDone(data["sha256"], data["untouched"], tuple(map(_site, data["sites"])))


def _site(data: dict[str, Any]) -> SiteEvidence:
    fields = {**data, "adaptations": tuple(data["adaptations"]), "retention": Retention(**data["retention"])}
    return SiteEvidence(**fields)
