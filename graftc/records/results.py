"""Fields common to the results of commands."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from graftc.records.fields import WRITTEN, NothingWritten, Warnings
from graftc.records.files import WrittenFile
from graftc.specs.records.record import Record


@dataclass(frozen=True, kw_only=True)
class CommandResult(Record):
    """The result of a command, which the command line completes (`graftc.cli.command`)."""

    warnings: Warnings = ()


@dataclass(frozen=True, kw_only=True)
class WrittenResult(CommandResult):
    """The result of a command that writes a folder or files."""

    out: str | None = None
    """The written folder or file; null with `--dry-run`."""

    dry_run: NothingWritten = False

    files: Annotated[tuple[WrittenFile, ...], WRITTEN] = ()
