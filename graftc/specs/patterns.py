"""The small languages of a spec: braces, globs and layers, and what to suggest where one matches nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from graftc.specs.diagnostics import GraftError, Place, nearest

__all__ = [
    "as_items",
    "count_sites",
    "expand_braces",
    "glob_to_regex",
    "layer_indices",
    "match_modules",
    "parse_layer",
    "parse_slice",
    "smallest_fix",
    "suggest",
    "write_items",
    "write_layers",
]

_BRANCH_LIMIT = 4096
_SLICE = re.compile(r"\s*(-?\d+)?\s*:\s*(-?\d+)?\s*(?::\s*(\d+)?\s*)?")


def expand_braces(text: str) -> list[str]:
    """The alternatives of ``a.{b,c{d,e}}`` in order: ``a.b``, ``a.cd``, ``a.ce``; without braces, the text.

    Raises:
        GraftError: GC002 for braces that do not pair, or more than 4096 alternatives.
    """
    out, end = _alternatives(text, 0, nested=False)
    if end != len(text):
        raise GraftError("GC002", f"'{text}' closes a brace that it never opened")
    return list(dict.fromkeys(out))


def _alternatives(text: str, start: int, *, nested: bool) -> tuple[list[str], int]:
    done: list[str] = []
    current = [""]
    at = start
    while at < len(text):
        char = text[at]
        if char == "{":
            inner, at = _alternatives(text, at + 1, nested=True)
            current = [a + b for a in current for b in inner]
        elif nested and char == ",":
            done, current, at = done + current, [""], at + 1
        elif char == "}":
            return (done + current, at + 1) if nested else (current, at)
        else:
            current, at = [a + char for a in current], at + 1
        if len(done) + len(current) > _BRANCH_LIMIT:
            raise GraftError("GC002", f"'{text}' has more than {_BRANCH_LIMIT} alternatives")
    if nested:
        raise GraftError("GC002", f"'{text}' opens a brace that it never closes")
    return current, at


@lru_cache(maxsize=4096)
def glob_to_regex(glob: str) -> re.Pattern[str]:
    """A compiled regex, to be used with ``fullmatch`` on a dotted module path, for one glob.

    ``*`` stands for any characters within one segment, ``**`` as a whole segment for any number of segments
    (none included), ``{a,b}`` for either. All else stands for itself.

    Raises:
        GraftError: GC002 for braces that do not pair.
    """
    return re.compile("|".join(f"(?:{_one_glob(branch)})" for branch in expand_braces(glob)))


def _one_glob(glob: str) -> str:
    segments = glob.split(".")
    if all(s == "**" for s in segments):
        return r".*"
    out = ""
    joined = True  # a dot is due before the next segment unless something already brought it
    for index, segment in enumerate(segments):
        if segment == "**":
            if index and segments[index - 1] == "**":
                continue
            rest = any(s != "**" for s in segments[index + 1 :])
            if not joined:
                out += r"(?:\.[^.]+)*"
            elif rest:
                out += r"(?:[^.]+\.)*"
            continue
        if not joined:
            out += r"\."
        out += r"[^.]*".join(re.escape(part) for part in re.split(r"\*+", segment))
        joined = False
    return out


def parse_layer(entry: int | str) -> int | slice:
    """One entry of ``layers``: see `parse_slice`."""
    return parse_slice(entry, "layer")


def parse_slice(entry: int | str, thing: str) -> int | slice:
    """An index of some ``thing``, or ``"start:stop"`` or ``"start:stop:step"`` as in Python.

    Raises:
        GraftError: GC002 where the text is neither.
    """
    if isinstance(entry, int):
        return entry
    if re.fullmatch(r"\s*-?\d+\s*", entry):
        return int(entry)
    match = _SLICE.fullmatch(entry)
    if match is None:
        hint = f'write a {thing} such as 3 or -1, a slice such as "0:6", or a list of them'
        raise GraftError("GC002", f"'{entry}' is no {thing} and no slice of {thing}s", hint=hint)
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    if step == 0:
        raise GraftError("GC002", f"the slice '{entry}' has step 0")
    return slice(start, stop, step)


def layer_indices(entry: int | str, depth: int) -> frozenset[int]:
    """The layers, from 0, that an entry names in a stack of ``depth`` layers.

    Negative ones count from the end. An index outside the stack names none; a slice is clipped, as in Python.

    Raises:
        GraftError: GC002 where the entry is not well formed.
    """
    parsed = parse_layer(entry)
    if isinstance(parsed, slice):
        return frozenset(range(*parsed.indices(depth)))
    index = parsed + depth if parsed < 0 else parsed
    return frozenset((index,)) if 0 <= index < depth else frozenset()


def as_items(value: Any) -> tuple[Any, ...]:
    """A field that holds nothing, one thing or several, as a tuple."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def smallest_fix(text: str, wrong: str, right: str) -> tuple[str, str] | None:
    """What to change in ``text`` to turn ``wrong`` into ``right``: it or one segment; None if unclear."""
    if text.count(wrong) == 1:
        return wrong, right
    old, new = wrong.split("."), right.split(".")
    pairs = [(a, b) for a, b in zip(old, new, strict=False) if a != b]
    if len(old) == len(new) and len(pairs) == 1:
        bad, good = pairs[0]
        if len(re.findall(rf"(?<!\w){re.escape(bad)}(?!\w)", text)) == 1 and text.count(bad) == 1:
            return bad, good
    return None


def suggest(
    glob: str, written: str, modules: Sequence[str], things: str = "site"
) -> tuple[str | None, tuple[str, str] | None]:
    """A hint for a glob that matches none of ``modules``, and what to change in ``written``."""
    if any(mark in glob for mark in "?["):
        return "'?' and '[...]' stand for themselves here; use regex instead", None
    for better in (f"**.{glob}", f"{glob}.**", f"**.{glob}.**"):
        count = sum(1 for m in modules if glob_to_regex(better).fullmatch(m))
        if count:
            fix = (glob, better) if glob == written else None
            return f"'{better}' matches {count_sites(count, things)}", fix
    close = nearest(glob, _like(glob, modules))
    if not close:
        return None, None
    return f"did you mean {' or '.join(repr(c) for c in close)}?", smallest_fix(written, glob, close[0])


def count_sites(count: int, thing: str = "site") -> str:
    """``1 site``, ``2 sites``."""
    return f"{count} {thing}" if count == 1 else f"{count} {thing}s"


def _like(glob: str, modules: Sequence[str]) -> list[str]:
    """Module paths in the manner of a glob: numbers as ``*``, and ``**`` first where the glob has it."""
    segments = glob.split(".")
    numbered = any(s.isdigit() for s in segments)
    paths = [m.split(".") if numbered else ["*" if s.isdigit() else s for s in m.split(".")] for m in modules]
    if segments[0] == "**" and len(segments) > 1:
        tail = len(segments) - 1
        paths = [["**", *path[-tail:]] for path in paths]
    return list(dict.fromkeys(".".join(path) for path in paths))


def match_modules(globs: Sequence[str], modules: Sequence[str], where: str = "train") -> list[str]:
    """The module paths that a list of globs means, in the order of ``modules``.

    Args:
        globs: patterns, as for ``Spec.train``.
        modules: the paths of all modules.
        where: path of the list in the spec, for errors.

    Raises:
        GraftError: GC011 where a glob or a brace branch matches no module.
    """
    out: set[str] = set()
    for index, glob in enumerate(globs):
        for branch in expand_braces(glob):
            fits = glob_to_regex(branch).fullmatch
            hits = {module for module in modules if fits(module)}
            if not hits:
                shown = f"'{branch}'" if branch == glob else f"'{branch}' of '{glob}'"
                message = f"{where} {shown} matches none of the {count_sites(len(modules), 'module')}"
                hint, fix = suggest(branch, glob, modules, "module")
                raise GraftError("GC011", message, place=Place(path=f"{where}[{index}]"), hint=hint, fix=fix)
            out |= hits
    return [module for module in modules if module in out]


def write_items(value: object) -> str:
    """A field as it may stand in a spec: an item, or a list in brackets."""
    items = [repr(v) if isinstance(v, str) else str(v) for v in as_items(value)]
    return items[0] if len(items) == 1 and not isinstance(value, tuple) else f"[{', '.join(items)}]"


def write_layers(layers: Sequence[int]) -> str:
    """Sorted layers as entries of ``layers:``, consecutive ones as slices."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return "[" + ", ".join(str(r[0]) if len(r) == 1 else f'"{r[0]}:{r[-1] + 1}"' for r in runs) + "]"
