"""Check the generation settings stored with a model, and report the errors that they cause."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from graftc.specs.errors.border import library_errors
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted

_BEAMS = 1_000
"""The maximum number of beams, and of returned texts: each uses as much memory as a whole text."""
_STOPS, _STOP = 100, 1_000
"""The maximum number of stop strings, and of characters in each."""
_HINT = "correct generation_config.json in the model's folder"
_OWN = Path(__file__).parents[2]


def require_settings(config: Any, beams: int | None) -> None:
    """Refuse generation settings of the wrong type or outside their limits.

    Args:
        config: the model's ``generation_config``.
        beams: the number of beams that the user requests; None to use the model's setting.

    Raises:
        GraftError: GC148 for the first setting that is refused.
    """
    for name in ("num_beams", "num_return_sequences"):
        value = beams if name == "num_beams" and beams is not None else getattr(config, name, None)
        if value is not None and not (_is_whole(value) and 1 <= value <= _BEAMS):
            raise _refused(name, value, f"an integer from 1 to {_BEAMS:,}")
    for name in ("eos_token_id", "pad_token_id", "bos_token_id"):
        value = getattr(config, name, None)
        tokens: list[Any] = value if isinstance(value, list) and name == "eos_token_id" else [value]
        if value is not None and not all(_is_whole(each) and abs(each) < 2**31 for each in tokens):
            raise _refused(name, value, "a token id")
    stops: Any = getattr(config, "stop_strings", None)
    if stops is not None and not _are_stops([stops] if isinstance(stops, str) else stops):
        raise _refused("stop_strings", stops, f"up to {_STOPS} strings of up to {_STOP:,} characters")


def _are_stops(listed: Any) -> bool:
    if not isinstance(listed, list) or not 1 <= len(listed) <= _STOPS:
        return False
    return all(isinstance(each, str) and 1 <= len(each) <= _STOP for each in listed)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(name: str, value: object, wanted: str) -> GraftError:
    return GraftError("GC148", f"{name} must be {wanted}, got {quoted(repr(value)[:200])}", hint=_HINT)


@contextlib.contextmanager
def generation_errors() -> Iterator[None]:
    """Run the block, which calls ``generate``, and turn errors from other libraries into GC148.

    A temperature of 0, for instance, causes such an error. Errors raised by graftc's own code pass unchanged.

    Raises:
        GraftError: GC148 for an error from another library.
    """
    try:
        yield
    except BaseException as error:
        if _raised_here(error.__traceback__):
            raise
        with library_errors("GC148", "the model cannot generate with its settings", hint=_HINT):
            raise


def _raised_here(trace: TracebackType | None) -> bool:
    """Return whether the innermost frame belongs to graftc."""
    last = None
    while trace is not None:
        last, trace = trace, trace.tb_next
    return last is not None and Path(last.tb_frame.f_code.co_filename).is_relative_to(_OWN)
