"""Error messages as one line that is the same in every run."""

from __future__ import annotations

import re

from graftc.specs.errors.diagnostics import GraftError


def describe(error: BaseException) -> str:
    """Return an error as one line that is the same in every run."""
    if isinstance(error, GraftError):
        return clean(f"{error.code}: {error.message}")
    return clean(f"{type(error).__name__}: {error}")


def clean(text: str, limit: int = 240) -> str:
    """Return text as one line without addresses, paths and numbered symbols, cut at ``limit``."""
    line = next((part.strip() for part in text.splitlines() if part.strip()), "")
    more = " ".join(part.strip() for part in text.splitlines()[1:3]) if line.endswith(":") else ""
    line = f"{line} {more}".strip()
    line = re.sub(r"0x[0-9a-f]+", "0x", line)
    line = re.sub(r"\b([su])\d+\b", r"\1", line)
    line = re.sub(r"(?<![\w:/])(/[\w.+-]+){2,}/", "", line)
    return line if len(line) <= limit else line[: limit - 3] + "..."
