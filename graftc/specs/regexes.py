"""Regular expressions of targets: those of Python, matched by a library that can be stopped."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.patterns import PATTERNS

if TYPE_CHECKING:
    from graftc.specs.errors.diagnostics import Place

__all__ = ["SECONDS", "RegexMatcher", "check_regex"]

SECONDS = 1.0
"""Seconds of computing for all regular expressions of a spec together."""

CHARACTERS = 10_000
"""How long one may be: compiling takes a tenth of a second then, and cannot be stopped."""

GROUPS = 50
"""How deep groups are nested."""

_COUNTED = re.compile(r"\{([0-9]*)(?:,([0-9]*))?\}")


def check_regex(text: str) -> int:
    """The size of a regular expression: its characters, times what its counts, as in ``a{3}``, multiply to.

    Raises:
        GraftError: GC002 where it is not one, GC009 where it is too long, repeats or nests too much to be compiled.
    """
    size = len(text)
    if size > CHARACTERS:
        hint = f"a regular expression has at most {CHARACTERS:,} characters; a list of names may be longer"
        raise GraftError("GC009", f"{quoted(text)} has {size:,} characters, too many to be compiled", hint=hint)
    for match in _COUNTED.finditer(text):
        size *= max([1, *(int(n) if len(n) < 10 else PATTERNS for n in match.groups() if n)])
        if size > PATTERNS:
            hint = "names are short; '*' and '+' repeat as often as it fits"
            raise GraftError("GC009", f"{quoted(text)} repeats too much to be compiled", hint=hint)
    if _depth(text) > GROUPS:
        hint = f"write it with at most {GROUPS} groups inside of each other"
        raise GraftError("GC009", f"{quoted(text)} nests groups too deeply", hint=hint)
    try:
        _compiled(text)
    except (re.error, ValueError, OverflowError) as error:
        hint = "a regular expression of Python that matches whole paths, such as '.*\\.(query|value)'"
        raise GraftError("GC002", f"{quoted(text)} is not a regular expression: {error}", hint=hint) from None
    return size


def _depth(text: str) -> int:
    """How deep groups are nested at most; brackets in character sets count as well."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    return deepest


_BRACKETS = re.compile(r"\\.|[()]", re.DOTALL)


@lru_cache(maxsize=64)
def _compiled(text: str) -> Any:
    """The pattern, which Python has to take too: what only ``regex`` knows, such as recursion, is not for specs."""
    import regex

    try:
        with warnings.catch_warnings():  # of what will mean something else in a later Python
            warnings.simplefilter("ignore")
            re.compile(text)
            return regex.compile(text)
    except regex.error as error:
        raise re.error(str(error)) from None


class RegexMatcher:
    """Matches regular expressions against paths of modules, for a spec's time in total at most."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds

    def matching(
        self, text: str, paths: Iterable[str], place: Place | None = None, *, anywhere: bool = False
    ) -> set[str]:
        """Those of ``paths`` that match as a whole, or ``anywhere``.

        Raises:
            GraftError: GC002 and GC009 as :func:`check_regex`; GC008 where the time for compiling and matching is over.
        """
        found: set[str] = set()
        started = time.process_time()
        try:
            if self.seconds <= 0:
                raise TimeoutError
            check_regex(text)
            pattern = _compiled(text)
            for path in dict.fromkeys(paths):
                left = self.seconds - (time.process_time() - started)
                if left <= 0:
                    raise TimeoutError
                if (pattern.search if anywhere else pattern.fullmatch)(path, timeout=left):
                    found.add(path)
        except (TimeoutError, MemoryError):
            message = f"matching {quoted(text)} takes longer than a spec has time for, which is {SECONDS:g} s in total"
            hint = "avoid repetitions inside of repetitions, as in (a+)+; modules: takes globs, which are always fast"
            raise GraftError("GC008", message, place=place, hint=hint) from None
        finally:
            self.seconds -= time.process_time() - started
        return found
