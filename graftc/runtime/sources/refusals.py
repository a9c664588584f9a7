"""The error for a model that cannot be loaded from its stated source."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from graftc.specs.errors.diagnostics import GraftError, first_line


def refuse(
    message: str,
    hint: str | None = None,
    *,
    cause: BaseException | None = None,
    details: Sequence[str] = (),
    code: str = "GC032",
) -> NoReturn:
    """Raise an error with the given code, by default GC032.

    Raises:
        GraftError: always.
    """
    raise GraftError(code, message, hint=hint, details=details) from cause


def reason_of(error: BaseException) -> str:
    """Return an error's first line, as text to follow a colon."""
    return first_line(error).rstrip(".")
