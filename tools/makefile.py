"""Variables of the Makefile, so that tools and targets use the same values."""

from __future__ import annotations

import re
from pathlib import Path

from tools.sources import ROOT


def makefile_variable(name: str, root: Path = ROOT) -> str:
    """Return the value of a variable that the Makefile sets with ``:=``.

    Raises:
        ValueError: if there is no such variable.
    """
    makefile = (root / "Makefile").read_text(encoding="utf-8")
    match = re.search(rf"^{name}\s*:=\s*(.*)$", makefile, re.MULTILINE)
    if match is None:
        raise ValueError(f"the Makefile has no variable {name}")
    return match[1].strip()


def variables_for_tests() -> dict[str, str]:
    """Return the environment variables with which the Makefile runs tests."""
    return dict(word.partition("=")[::2] for word in makefile_variable("TEST_ENV").split())
