"""Issue warnings at the user's own line, however deep in the package they arise."""

from __future__ import annotations

import os
import sys
import warnings
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

_PACKAGE = f"{Path(__file__).parents[2]}{os.sep}"


def issue(warning: Warning) -> None:
    """Issue a warning at the innermost frame outside this package, the standard library and installed packages.

    For example, a model's step may be called by torch, which is called by a trainer. If there is no such frame, the
    warning is issued at the innermost frame outside this package.
    """
    frame = _user_frame(sys._getframe(1))
    module = frame.f_globals.get("__name__") or "<unknown>"
    registry = frame.f_globals.setdefault("__warningregistry__", {})
    _at(warning, (frame.f_code.co_filename, frame.f_lineno), module, registry)


def again(caught: warnings.WarningMessage) -> None:
    """Reissue a caught warning at its original line."""
    assert isinstance(caught.message, Warning)
    _at(caught.message, (caught.filename, caught.lineno), Path(caught.filename).stem)


def _at(warning: Warning, line: tuple[str, int], module: str, registry: Any = None) -> None:
    warnings.warn_explicit(warning, type(warning), *line, module=module, registry=registry)


def _user_frame(start: FrameType) -> FrameType:
    outside: FrameType | None = None
    outermost, frame = start, start.f_back
    while frame is not None:
        if not _is_ours(frame):
            outside = outside or frame
            if not frame.f_code.co_filename.startswith(_installed()):
                return frame
        outermost, frame = frame, frame.f_back
    return outside or outermost


def _is_ours(frame: FrameType) -> bool:
    """Return whether a frame belongs to this package, or to generated code without a file.

    Such code comes from data class methods and from graphs, which do not belong to a module.
    """
    name = str(frame.f_globals.get("__name__") or "")
    file = frame.f_code.co_filename
    generated = file.startswith("<") and (not name or file.startswith(("<frozen", "<eval_with_key>")))
    return generated or name.partition(".")[0] == "graftc" or file.startswith(_PACKAGE)


@cache
def _installed() -> tuple[str, ...]:
    """Return the folders of the standard library and of installed packages."""
    import sysconfig

    paths = sysconfig.get_paths()
    return tuple({f"{paths[kind]}{os.sep}" for kind in ("stdlib", "platstdlib", "purelib", "platlib")})
