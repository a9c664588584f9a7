"""Import packages that graftc needs for some of its features only."""

from __future__ import annotations

import importlib
from typing import Any

from graftc.specs.errors.diagnostics import GraftError


def optional_package(name: str, purpose: str, extra: str) -> Any:
    """Return an optional package.

    Args:
        name: the name under which it is imported and installed.
        purpose: what needs it, to begin the message with.
        extra: the extra of graftc that installs it.

    Raises:
        GraftError: GC061 if it cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        message = f"{purpose} needs the package {name}"
        raise GraftError("GC061", message, hint=f"pip install 'graftc[{extra}]'") from error
