"""Conversion of errors that other libraries raise on untrusted files to coded errors. The standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from graftc.specs.errors.diagnostics import GraftError, GraftWarning, first_line


def is_failure(error: BaseException) -> bool:
    """Return whether a raised exception means that work failed.

    Failures are any `Exception`, and a panic of a library in Rust, which is not an `Exception`. An exception that ends
    a program, a generator or a task is not a failure.
    """
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


@contextlib.contextmanager
def library_errors(
    code: str,
    message: str | Callable[[], str],
    *,
    hint: str | None = None,
    codes: Mapping[type[BaseException], str] | None = None,
) -> Iterator[None]:
    """Run a call of another library on untrusted files, and turn its failures into a `GraftError`.

    A `GraftError` passes unchanged; so do `KeyboardInterrupt`, `SystemExit`, `GeneratorExit` and anything else that is
    not a failure. `MemoryError` and `RecursionError` are failures of the file.

    Args:
        code: the code of the error.
        message: what could not be done, such as ``"the tokenizer of 'x' cannot be read"``; the library's reason is
            appended after a colon. A function is called only after a failure.
        hint: what to try; the code's remedy by default.
        codes: other codes for some classes of exceptions.

    Raises:
        GraftError: as the arguments say.
    """
    try:
        yield
    except (GraftError, GraftWarning):
        raise
    except BaseException as error:
        if not is_failure(error):
            raise
        chosen = next((own for kind, own in (codes or {}).items() if isinstance(error, kind)), code)
        said = message if isinstance(message, str) else message()
        raise GraftError(chosen, f"{said}: {first_line(error)[:_LONGEST].rstrip('. ')}", hint=hint) from error


_LONGEST = 500
"""The largest number of characters of a library's reason in a message."""
