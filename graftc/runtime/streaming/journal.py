"""The journal of a merge, which lists its finished files so that a killed merge can be resumed.

A file's line is written after the file itself has been flushed to disk. When a merge is resumed, every file is compared
with the digest in its line, and is written again if they differ. This detects damage. Beyond that, the journal is not
trusted: anybody who can write one can also write a file that matches it, so merging checks the file's contents.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path

from graftc.runtime.artifact.write import file_digest
from graftc.runtime.streaming.site_fold import Folds
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json

_NAME = "journal.jsonl"
_BYTES = 2**26


@dataclass(frozen=True)
class ShardDone:
    """A finished file.

    Attributes:
        sha256: the digest of the written file.
        untouched: the number of tensors that equal the base's, bit for bit, either in full or in all rows that were
            not folded.
        folds: what folding has measured.
    """

    sha256: str
    untouched: int
    folds: Folds


class Journal:
    """Lines of JSON, one for each finished file, with its name and digest.

    Args:
        staging: the folder that contains the journal.
        folder: the folder that contains the files.
    """

    def __init__(self, staging: Path, folder: Path) -> None:
        self._path, self._folder = staging / _NAME, folder

    def done(self) -> dict[str, str]:
        """Return the SHA-256, by name, of each listed file that has not changed since it was listed."""
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
                continue  # the process was killed while writing this line
        return {name: digest for name, digest in listed.items() if self._is(name, digest)}

    def _is(self, name: str, digest: str) -> bool:
        path = self._folder / name
        try:
            return name != "" and stat.S_ISREG(os.lstat(path).st_mode) and file_digest(path) == digest
        except (OSError, ValueError):
            return False

    def add(self, name: str, done: ShardDone) -> None:
        """Record that a file is finished and flushed to disk."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file": name, "sha256": done.sha256}) + "\n")
            file.flush()
            os.fsync(file.fileno())
