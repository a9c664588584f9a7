"""Coded errors and warnings: the lowest layer, which uses only the standard library.

Every failure that a user can cause is a :class:`GraftError` with a stable code, its place in the spec and, if it can be
guessed, the corrected line. :data:`CATALOGUE` contains all codes.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Self

from graftc.specs.errors.catalogue import CATALOGUE, Code
from graftc.specs.errors.text import printable, quoted, some
from graftc.specs.errors.user_line import issue

_LONGEST = 200
_MOST_CANDIDATES = 20_000
"""The maximum number of candidates with which a word is compared."""

__all__ = ["CATALOGUE", "Code", "GraftError", "GraftWarning", "Place", "first_line", "nearest", "warn"]


@dataclass(frozen=True)
class Place:
    """The place of an error in a spec: file, 1-based line and column, and a path such as ``adapt[0].target.role``.

    ``text`` is the source line, which the error shows next to the corrected one.
    """

    file: str | None = None
    line: int | None = None
    column: int | None = None
    path: str = ""
    text: str | None = None

    def __str__(self) -> str:
        numbers = [str(n) for n in (self.line, self.column) if n is not None]
        if self.file is None and numbers:
            numbers[0] = f"line {numbers[0]}"
        spot = ":".join(([self.file] if self.file is not None else []) + numbers)
        if not spot:
            return self.path
        return f"{spot} ({self.path})" if self.path else spot


class _Coded(Exception):  # noqa: N818
    """The common base class of errors and warnings."""

    def __init__(
        self,
        code: str,
        message: str,
        *,
        place: Place | None = None,
        hint: str | None = None,
        details: Sequence[str | GraftError] = (),
        fix: tuple[str, str] | None = None,
        corrected: str | None = None,
    ) -> None:
        if code not in CATALOGUE:
            raise KeyError(f"{code} is not in the catalogue of diagnostics")
        self.code, self.message, self.place = code, message, place
        self.hint = hint or CATALOGUE[code].remedy
        self.details, self.fix, self.corrected = tuple(details), fix, corrected
        super().__init__(code, message)

    def changed(self, **changes: Any) -> Self:
        """Return the same error with some arguments changed; its code and message stay the same."""
        arguments = {name: getattr(self, name) for name in ("place", "hint", "details", "fix", "corrected")}
        return type(self)(self.code, self.message, **{**arguments, **changes})

    def within(self, path: str) -> Self:
        """Return the same error placed at ``path``; if it already has a place, that place is nested below ``path``.

        Args:
            path: a path such as ``adapt[0]``.
        """
        inner = self.place.path if self.place is not None else ""
        joined = path + (f".{inner}" if inner and not inner.startswith("[") else inner)
        return self.changed(place=Place(path=joined))

    @property
    def exit_code(self) -> int:
        """The command's exit status: 1 for a negative answer, 2 for a wrong spec, 3 for a failure of files or model."""
        return CATALOGUE[self.code].exit_code

    def __str__(self) -> str:
        """Return the text for users, with control characters escaped so that it is safe for a terminal."""
        return printable("\n".join(_lines(self)))

    def to_json(self) -> dict[str, Any]:
        """Return the error as plain data, including details; unknown values are None."""
        place = self.place or Place()
        return {
            "code": self.code,
            "title": CATALOGUE[self.code].title,
            "message": self.message,
            "file": place.file,
            "line": place.line,
            "column": place.column,
            "path": place.path,
            "hint": self.hint,
            "corrected": self.corrected,
            "details": [d.to_json() if isinstance(d, GraftError) else d for d in self.details],
            "exit_code": self.exit_code,
        }


def _lines(error: _Coded, *, nested: bool = False) -> list[str]:
    """Return the lines of an error's text. A nested detail omits its hint if that is only its code's remedy."""
    lines = [f"{error.code}: {error.message}"]
    if error.place is not None and str(error.place):
        lines.append(f"  --> {error.place}")
    if not (nested and error.hint == CATALOGUE[error.code].remedy):
        lines += [f"  {'hint:' if i == 0 else '     '} {part}" for i, part in enumerate(error.hint.split("\n"))]
    if error.corrected is not None:
        number = error.place.line if error.place is not None and error.place.line is not None else ""
        if error.place is not None and error.place.text is not None:
            lines.append(f"  {number:>4} - {error.place.text}".rstrip())
        lines.append(f"  {number:>4} + {error.corrected}".rstrip())
    for detail in error.details:
        coded = _lines(detail, nested=True) if isinstance(detail, GraftError) else None
        first, *rest = coded or str(detail).split("\n")
        lines.append(f"  {'also' if coded else '-'} {first}")
        lines += [f"  {line}" for line in rest]
    return lines


class GraftError(_Coded):
    """A failure that the user can act on.

    Args:
        code: a key of :data:`CATALOGUE`.
        message: one sentence, lower case, no full stop.
        place: the place in the spec.
        hint: advice to the user; may span lines. Default: the code's remedy.
        details: further facts as strings, or further errors found at the same time.
        fix: the wrong word and the right one, from which the corrected line is created once the source is known.
        corrected: the whole source line, corrected.

    Raises:
        KeyError: if ``code`` is not in the catalogue.
    """


class GraftWarning(_Coded, UserWarning):
    """A warning about something that works but deserves attention. Takes the same arguments as :class:`GraftError`."""


def warn(
    code: str, message: str, *, place: Place | None = None, hint: str | None = None, details: Sequence[str] = ()
) -> None:
    """Issue a :class:`GraftWarning` at the line of user code that caused it."""
    issue(GraftWarning(code, message, place=place, hint=hint, details=details))


def first_line(error: BaseException) -> str:
    """Return an error's class name and the first line of its message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def nearest(word: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """Return the up to ``n`` candidates most similar to ``word``, best first; empty if none is similar enough.

    The list is also empty for a word of excessive length. Of very many candidates, only the first are compared.
    """
    if len(word) > _LONGEST:
        return []
    by_lower: dict[str, str] = {}
    for candidate in islice(candidates, _MOST_CANDIDATES):
        by_lower.setdefault(candidate.lower(), candidate)
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=n, cutoff=0.6)
    return [by_lower[c] for c in close]


def nearest_beside(path: Path, wanted: Callable[[Path], bool]) -> Path | None:
    """Return the path beside another one, which does not exist, whose name is most similar; None if none is similar.

    Args:
        path: the path that does not exist.
        wanted: a function that returns whether an existing path may be meant.
    """
    try:
        names = [other.name for other in path.parent.iterdir() if wanted(other)]
    except OSError:
        return None
    close = nearest(path.name, names, n=1)
    return path.parent / close[0] if close else None


def correction(word: object, known: Iterable[str], otherwise: str = "") -> tuple[str, tuple[str, str] | None]:
    """Return a hint with the known word most similar to ``word``, and the pair of both words as a fix.

    If no known word is similar enough, or ``word`` is not a string, the hint is ``otherwise`` and the fix is None.
    """
    close = nearest(word, known, n=1) if isinstance(word, str) else []
    return (f"did you mean {quoted(close[0])}?", (str(word), close[0])) if close else (otherwise, None)


def alternatives(word: str, known: Collection[str], what: str) -> str:
    """Return the hint for a word that is not in ``known``: the nearest known word, or all of them after ``what``."""
    return correction(word, known, f"the {what} are {', '.join(known)}")[0]


def unknown_name(kind: str, name: object, known: Iterable[str]) -> GraftError:
    """Return the error GC091 for an unknown name, with the nearest existing name as its correction.

    Args:
        kind: the kind of object that was looked up, such as ``"adaptation"``.
        name: the requested name.
        known: the existing names.
    """
    names = list(known)
    hint, fix = correction(name, names, f"available: {some(names) or 'none'}")
    return GraftError("GC091", f"there is no {kind} {quoted(str(name))}", hint=hint, fix=fix)
