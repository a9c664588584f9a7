"""Convert errors that other libraries raise for untrusted files to coded errors. Uses only the standard library."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from graftc.specs.errors.diagnostics import GraftError, GraftWarning, first_line


def is_failure(error: BaseException) -> bool:
    """Return whether a raised exception means that an operation failed.

    Any `Exception` is a failure, and so is a panic in a Rust library, which is not an `Exception`. An exception that
    ends a program, a generator or a task is not a failure.
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
    """Run the block, which calls another library on untrusted files, and convert its failures to a `GraftError`.

    A `GraftError` passes through unchanged, as do `KeyboardInterrupt`, `SystemExit`, `GeneratorExit` and anything else
    that is not a failure. `MemoryError` and `RecursionError` are attributed to the file.

    Args:
        code: the error code.
        message: the operation that failed, such as ``"the tokenizer of 'x' cannot be read"``; the library's reason is
            appended after a colon. A function is called only after a failure.
        hint: advice to the user; by default the code's remedy.
        codes: different codes for some exception classes.

    Raises:
        GraftError: for a failure, with the code, message and hint from the arguments.
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
"""The maximum length of a library's reason in a message, in characters."""
