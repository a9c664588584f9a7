"""Where other libraries read what somebody else wrote: whatever they raise there has a code. Standard library only."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping

from graftc.specs.errors.diagnostics import GraftError, GraftWarning, first_line

__all__ = ["is_failure", "library_errors"]


def is_failure(error: BaseException) -> bool:
    """Whether something that was raised says that work failed: any `Exception`, and a panic of a library in Rust, which
    is no `Exception`. What ends a program, a generator or a task says something else.
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
    """Around a call of another library on files that anybody may have written: its failures become a `GraftError`.

    A `GraftError` passes as it is; so do `KeyboardInterrupt`, `SystemExit`, `GeneratorExit` and whatever else is no
    failure. `MemoryError` and `RecursionError` are failures of the file.

    Args:
        code: of the error.
        message: what could not be done, such as ``"the tokenizer of 'x' cannot be read"``; the library's reason is
            added behind a colon. A function is called only when something failed.
        hint: what to try; the code's remedy by default.
        codes: other codes for some kinds of failures.

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
        found = next((own for kind, own in (codes or {}).items() if isinstance(error, kind)), code)
        said = message if isinstance(message, str) else message()
        raise GraftError(found, f"{said}: {first_line(error)[:_LONGEST].rstrip('. ')}", hint=hint) from error


_LONGEST = 500
"""Characters of a library's reason that are shown."""
