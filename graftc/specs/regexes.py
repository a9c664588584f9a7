"""Regular expressions in targets: Python's syntax, matched by a library that supports timeouts."""

from __future__ import annotations

import re
import time
import warnings
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import quoted
from graftc.specs.patterns import PATTERNS

SECONDS = 1.0
"""The time limit in seconds for all regular expressions of a spec together."""

CHARACTERS = 10_000
"""Maximum length in characters: compiling such a regular expression takes 0.1 s, and cannot be interrupted."""

GROUPS = 50
"""Maximum depth of nested groups."""

_COUNTED = re.compile(r"\{([0-9]*)(?:,([0-9]*))?\}")


def check_regex(text: str) -> int:
    """Return the size of a regular expression: its length times the product of its counts, as in ``a{3}``.

    Raises:
        GraftError: GC002 if it is not a regular expression; GC009 if it is too long, or repeats or nests too much to be
            compiled.
    """
    size = len(text)
    if size > CHARACTERS:
        hint = f"a regular expression has at most {CHARACTERS:,} characters; a list of names may be longer"
        raise GraftError("GC009", f"{quoted(text)} has {size:,} characters, too many to be compiled", hint=hint)
    for match in _COUNTED.finditer(text):
        size *= max([1, *(int(n) if len(n) < 10 else PATTERNS for n in match.groups() if n)])
        if size > PATTERNS:
            hint = "use '*' or '+', which repeat as often as needed"
            raise GraftError("GC009", f"{quoted(text)} repeats too much to be compiled", hint=hint)
    if _depth(text) > GROUPS:
        hint = f"nest at most {GROUPS} groups"
        raise GraftError("GC009", f"{quoted(text)} nests groups too deeply", hint=hint)
    try:
        _compiled(text)
    except (re.error, ValueError, OverflowError) as error:
        hint = "write a Python regular expression that matches whole paths, such as '.*\\.(query|value)'"
        raise GraftError("GC002", f"{quoted(text)} is not a regular expression: {error}", hint=hint) from None
    return size


def _depth(text: str) -> int:
    """Return the greatest depth of nested groups; brackets in character sets count as well."""
    depth = deepest = 0
    for match in _BRACKETS.finditer(text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        deepest = max(deepest, depth)
    return deepest


_BRACKETS = re.compile(r"\\.|[()]", re.DOTALL)


@lru_cache(maxsize=64)
def _compiled(text: str) -> Any:
    """Compile a pattern that Python accepts as well; features that only ``regex`` has, like recursion, are refused."""
    import regex

    try:
        with warnings.catch_warnings():  # about syntax that will change in a later Python
            warnings.simplefilter("ignore")
            re.compile(text)
            return regex.compile(text)
    except regex.error as error:
        raise re.error(str(error)) from None


class RegexMatcher:
    """Matches regular expressions against module paths, within a total time limit for a spec."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self.seconds = seconds

    def matching(
        self, text: str, paths: Iterable[str], place: Place | None = None, *, anywhere: bool = False
    ) -> set[str]:
        """Return those of ``paths`` that match as a whole, or ``anywhere``.

        Raises:
            GraftError: GC002 and GC009 as for :func:`check_regex`; GC008 if compiling and matching exceeds the time
                limit.
        """
        matches: set[str] = set()
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
                    matches.add(path)
        except (TimeoutError, MemoryError):
            message = f"matching {quoted(text)} exceeds the time limit of {SECONDS:g} s for all expressions of a spec"
            hint = "avoid nested repetitions such as (a+)+, or use modules: with globs, which are always fast"
            raise GraftError("GC008", message, place=place, hint=hint) from None
        finally:
            self.seconds -= time.process_time() - started
        return matches
