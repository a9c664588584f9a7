"""Coded errors and warnings: the lowest layer, the standard library only.

Every failure that a user can cause is a :class:`GraftError` with a stable code, the place in the spec and,
where one can be guessed, the corrected line. :data:`CATALOGUE` holds all codes.
"""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["CATALOGUE", "Code", "GraftError", "GraftWarning", "Place", "nearest", "warn"]


@dataclass(frozen=True)
class Code:
    """One stable code: a short title, what it means, and the exit status of the command line."""

    code: str
    title: str
    explanation: str
    exit_code: int


_SPEC, _NO, _FAILED = 2, 1, 3

_TABLE: tuple[tuple[str, int, str, str], ...] = (
    (
        "GC001",
        _SPEC,
        "the spec cannot be read",
        "The file is not valid YAML, JSON or TOML, or holds no mapping.",
    ),
    ("GC002", _SPEC, "a value is not allowed", "A value is missing, of the wrong type or out of its bounds."),
    ("GC003", _SPEC, "a field is unknown", "No field of this name exists here; nothing is ignored silently."),
    ("GC004", _SPEC, "a method is unknown", "No built-in method and no installed plugin has this tag."),
    (
        "GC005",
        _SPEC,
        "two adaptations have one name",
        "A name prefixes the tensors of its adaptation: it is unique.",
    ),
    (
        "GC006",
        _SPEC,
        "the spec file is not there",
        "The path does not exist, is a folder or may not be read.",
    ),
    ("GC007", _SPEC, "the spec version is not supported", "This release reads version 1."),
    (
        "GC011",
        _SPEC,
        "a pattern matches nothing",
        "Every list item, brace branch, layer entry and exclusion matches.",
    ),
    ("GC012", _SPEC, "a role is unknown", "`graftc roles MODEL` prints the roles that a model has."),
    (
        "GC013",
        _SPEC,
        "another number of sites was expected",
        "`expect` counts the sites left after all narrowing.",
    ),
    (
        "GC014",
        _SPEC,
        "the target selects no site",
        "Every pattern matches, but the narrowing leaves nothing.",
    ),
    ("GC015", _SPEC, "a role is absent", "The model, or some of its layers, has no site of this role."),
    (
        "GC016",
        _SPEC,
        "the method does not take such sites",
        "A method's claims list the kinds of site it can adapt.",
    ),
    (
        "GC017",
        _SPEC,
        "the site cannot be adapted",
        "Its weight is no linear map's, or the model reads it as more than some rows of one stored tensor.",
    ),
    (
        "GC018",
        _SPEC,
        "tokens cannot be added",
        "The model must say which table holds its tokens, and read it in ways that new rows can be put into.",
    ),
    (
        "GC020",
        _SPEC,
        "the rank exceeds the layer",
        "A rank above min(in, out) adds parameters, not functions.",
    ),
    (
        "GC021",
        _SPEC,
        "two owners of the same rows",
        "Rows of one tensor belong to one base-training adaptation.",
    ),
    (
        "GC022",
        _SPEC,
        "a tied weight cannot be folded",
        "Folding would change the other user of the tensor as well.",
    ),
    ("GC023", _SPEC, "no gradient path", "A trainable tensor reaches no output, so it would never learn."),
    (
        "GC024",
        0,
        "a weight is read outside its module",
        "It trains, but folding it would change other readers.",
    ),
    ("GC030", _FAILED, "the model cannot be captured", "torch.export could not turn the model into a graph."),
    (
        "GC031",
        _FAILED,
        "the inputs cannot be captured",
        "No graph can be made for this combination of inputs.",
    ),
    ("GC032", _FAILED, "the model cannot be loaded", "The folder, hub id or callable gave no model."),
    (
        "GC033",
        _FAILED,
        "the graphs are for another dtype",
        "A capture holds for one dtype; load the base in the other.",
    ),
    ("GC034", _SPEC, "there are no layers", "Checkpointing per layer needs a model with repeated layers."),
    ("GC040", _FAILED, "a pass broke an invariant", "The verifier found the graph wrong after a pass."),
    (
        "GC050",
        _NO,
        "an adaptation cannot be folded",
        "It has no equivalent change of base weights or constants.",
    ),
    (
        "GC051",
        _NO,
        "the certificate is over budget",
        "Folded and unfolded outputs differ by more than allowed.",
    ),
    (
        "GC052",
        _NO,
        "the weights do not fit the class",
        "The original class has no tensor for a folded weight.",
    ),
    ("GC053", _FAILED, "adapter tensors do not fit", "Names and shapes must be those of the compiled spec."),
    ("GC054", _SPEC, "a merged model cannot train", "Merging is for deployment; the compiled model trains."),
    ("GC060", _FAILED, "the export failed", "The exporter or the check of what it wrote failed."),
    ("GC061", _FAILED, "an optional package is missing", "The message names the extra that installs it."),
    ("GC062", _FAILED, "the demo's data is missing", "The message names the commands that fetch it."),
    ("GC063", _FAILED, "the destination exists", "Nothing is overwritten: choose another path or remove it."),
    ("GC070", _FAILED, "a method is registered twice", "Two modules claim one tag."),
    ("GC071", _FAILED, "a plugin is not a method", "An entry point of `graftc.methods` is broken."),
)

CATALOGUE: dict[str, Code] = {code: Code(code, title, text, exit_code) for code, exit_code, title, text in _TABLE}
"""Every code, in order."""


@dataclass(frozen=True)
class Place:
    """Where a spec is wrong: file, line and column from 1, and a path such as ``adapt[0].target.role``.

    ``text`` is the source line, kept so that the error can show it beside the corrected one.
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


class _Coded:
    """What errors and warnings share."""

    code: str
    message: str
    place: Place | None
    hint: str | None
    details: tuple[str | GraftError, ...]
    fix: tuple[str, str] | None
    corrected: str | None

    def _set(
        self,
        code: str,
        message: str,
        place: Place | None,
        hint: str | None,
        details: Sequence[str | GraftError],
        fix: tuple[str, str] | None,
        corrected: str | None,
    ) -> None:
        if code not in CATALOGUE:
            raise KeyError(f"{code} is not in the catalogue of diagnostics")
        self.code, self.message, self.place, self.hint = code, message, place, hint
        self.details, self.fix, self.corrected = tuple(details), fix, corrected

    @property
    def exit_code(self) -> int:
        """The exit status of the command: 1 the answer is no, 2 a wrong spec, 3 files or model failed."""
        return CATALOGUE[self.code].exit_code

    def __str__(self) -> str:
        lines = [f"{self.code}: {self.message}"]
        if self.place is not None and str(self.place):
            lines.append(f"  --> {self.place}")
        if self.hint:
            lines += [f"  {'hint:' if i == 0 else '     '} {part}" for i, part in enumerate(self.hint.splitlines())]
        if self.corrected is not None:
            number = self.place.line if self.place is not None and self.place.line is not None else ""
            if self.place is not None and self.place.text is not None:
                lines.append(f"  {number:>4} - {self.place.text}".rstrip())
            lines.append(f"  {number:>4} + {self.corrected}".rstrip())
        for detail in self.details:
            first, *rest = str(detail).splitlines() or [""]
            lines.append(f"  {'also' if isinstance(detail, GraftError) else '-'} {first}")
            lines += [f"  {line}" for line in rest]
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """The same as plain data, details included; what is not known is None."""
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

    def _arguments(self) -> tuple[Any, ...]:
        return (
            type(self),
            self.code,
            self.message,
            self.place,
            self.hint,
            self.details,
            self.fix,
            self.corrected,
        )


class GraftError(_Coded, Exception):
    """A failure that the user can act on.

    Args:
        code: a key of :data:`CATALOGUE`.
        message: one sentence, lower case, no full stop.
        place: where in the spec.
        hint: what to try; may span lines.
        details: further facts as strings, or further errors found in the same go.
        fix: the wrong word and the right one, from which the corrected line is made once the source is known.
        corrected: the whole source line, corrected.

    Raises:
        KeyError: ``code`` is not in the catalogue.
    """

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
        self._set(code, message, place, hint, details, fix, corrected)
        super().__init__(code, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._arguments()


class GraftWarning(_Coded, UserWarning):
    """Like :class:`GraftError`, for what works but deserves a look. Same arguments."""

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
        self._set(code, message, place, hint, details, fix, corrected)
        super().__init__(code, message)

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, self._arguments()


def _rebuild(
    kind: type[GraftError] | type[GraftWarning],
    code: str,
    message: str,
    place: Place | None,
    hint: str | None,
    details: tuple[str | GraftError, ...],
    fix: tuple[str, str] | None,
    corrected: str | None,
) -> GraftError | GraftWarning:
    return kind(code, message, place=place, hint=hint, details=details, fix=fix, corrected=corrected)


def warn(
    code: str,
    message: str,
    *,
    place: Place | None = None,
    hint: str | None = None,
    details: Sequence[str] = (),
    stacklevel: int = 2,
) -> None:
    """Issue a :class:`GraftWarning`; ``stacklevel`` counts from the caller as in :func:`warnings.warn`."""
    warnings.warn(GraftWarning(code, message, place=place, hint=hint, details=details), stacklevel=stacklevel + 1)


def nearest(word: str, candidates: Iterable[str], n: int = 3) -> list[str]:
    """The at most ``n`` candidates that look most like ``word``, best first; empty if none comes close."""
    by_lower: dict[str, str] = {}
    for candidate in candidates:
        by_lower.setdefault(candidate.lower(), candidate)
    close = difflib.get_close_matches(word.lower(), list(by_lower), n=n, cutoff=0.6)
    return [by_lower[c] for c in close]
