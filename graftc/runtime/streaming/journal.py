"""The journal of a merge: what has been done of it, so that a killed one goes on where it was.

A file's line is written after the file itself is on the disk. When a merge is resumed, every file is held against the
digest in its line, and done again where they differ. That tells damage. The journal is not believed otherwise: whoever
can make one can make a file that fits it, so that merging looks at what is in the file.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from graftc.compiler.folding.certificate import SiteEvidence
from graftc.runtime.artifact.write import file_digest
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json

__all__ = ["Journal", "ShardDone"]


_NAME = "journal.jsonl"
_BYTES = 2**26


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
    """Lines of JSON, one for each file that is done: its name and digest.

    Args:
        staging: the folder in which it is.
        folder: where the files are.
    """

    def __init__(self, staging: Path, folder: Path) -> None:
        self._path, self._folder = staging / _NAME, folder

    def done(self) -> dict[str, str]:
        """SHA-256 of the files that are said to be done, and are as they were written."""
        try:
            lines = read_regular(self._path, _BYTES, follow=False).split(b"\n")
        except OSError:
            return {}
        listed: dict[str, str] = {}
        for line in lines:
            try:
                data = read_json(line, _BYTES)
                listed[os.path.basename(data["file"])] = str(data["sha256"])
            except (ValueError, KeyError, TypeError):
                continue  # it was killed while it wrote this
        return {name: digest for name, digest in listed.items() if self._is(name, digest)}

    def _is(self, name: str, digest: str) -> bool:
        path = self._folder / name
        try:
            return name != "" and stat.S_ISREG(os.lstat(path).st_mode) and file_digest(path) == digest
        except (OSError, ValueError):
            return False

    def add(self, name: str, done: ShardDone) -> None:
        """Note that a file is done, and lies on the disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "sha256": done.sha256}) + "\n")
            file.flush()
            os.fsync(file.fileno())
