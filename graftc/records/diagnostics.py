"""Failures and warnings as commands print them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Le

from graftc.specs.records.record import Pattern, Record


@dataclass(frozen=True)
class Diagnostic(Record):
    """A failure, or a warning: what works but deserves a look."""

    code: Annotated[str, Pattern("^GC[0-9]{3}$")]
    """The stable code."""

    title: str
    """The meaning of the code."""

    message: str
    """The problem, in one sentence."""

    file: str | None
    """The file that is wrong; null where none is."""

    line: Annotated[int | None, Ge(1)]
    """Its line, from 1."""

    column: Annotated[int | None, Ge(1)]
    """The column in it, from 1."""

    path: str
    """The place in the spec, such as `adapt[0].target.role`; empty where there is none."""

    hint: str | None
    """A possible remedy."""

    corrected: str | None
    """The whole line, corrected, where that can be guessed."""

    details: tuple[str | Diagnostic, ...]
    """Further facts as text, and further failures found in the same go."""

    exit_code: Annotated[int, Ge(0), Le(3)]
    """The exit status: 1 the answer is no, 2 a usage or spec error, 3 the files or the model failed; 0 for warnings."""


@dataclass(frozen=True)
class ErrorResult(Record):
    """The output of a command that fails."""

    error: Diagnostic
    """The failure."""
