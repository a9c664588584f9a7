"""Errors and warnings of graftc: calls that it refuses, and calls about which it has nothing to say."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from graftc.specs.errors.diagnostics import GraftError, GraftWarning


def refused(
    call: Callable[..., object], /, *args: Any, code: str | None = None, seconds: float | None = None, **kwargs: Any
) -> GraftError:
    """Return the error that a call raises, which must have a hint.

    Args:
        call: the function.
        args: its arguments.
        code: the code that the error must have; by default any.
        seconds: a bound on the processor time of the call; by default none.
        kwargs: its arguments by name.
    """
    started = time.process_time()
    with pytest.raises(GraftError) as caught:
        call(*args, **kwargs)
    took = time.process_time() - started
    error = caught.value
    assert code in (None, error.code), f"it is {error.code}, not {code}: {error}"
    assert error.hint
    assert seconds is None or took < seconds, f"it took {took:.1f} s: {error}"
    return error


@contextmanager
def no_warning() -> Iterator[None]:
    """Turn warnings of graftc into errors while the block runs."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", GraftWarning)
        yield
