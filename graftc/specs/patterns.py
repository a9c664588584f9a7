"""The pattern languages of a spec (braces, globs and layers), and suggestions for patterns that match nothing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from graftc.specs.errors.diagnostics import GraftError, Place, nearest
from graftc.specs.errors.text import consecutive, counted, quoted

BRANCHES = 1_000
"""Maximum number of alternatives that the braces of a pattern expand to, including repeated ones."""

PATTERNS = 100_000
"""Maximum number of characters in all patterns of a spec, with braces expanded."""

NESTED = 16
"""Maximum depth of nested braces."""

_SLICE = re.compile(r"\s*(-?[0-9]{1,9})?\s*:\s*(-?[0-9]{1,9})?\s*(?::\s*([0-9]{1,9})?\s*)?")
_BRACES = re.compile(r"[{},]|[^{},]+")


def measure_braces(text: str) -> tuple[int, int]:
    """Return the number of alternatives that braces expand to, including repeated ones, and their total length.

    Raises:
        GraftError: GC002 for unbalanced braces, GC009 for more than 1,000 alternatives or braces nested deeper than 16.
    """
    # For each open brace, and for the text around all of them: the finished alternatives, and the one being read.
    done, current = [(0, 0)], [(1, 0)]
    for piece in _BRACES.findall(text):
        if piece == "{":
            if len(done) > NESTED:
                raise _too_many(text, f"nests braces deeper than {NESTED} levels")
            done.append((0, 0))
            current.append((1, 0))
        elif piece == "}":
            if len(done) == 1:
                hint = "each '}' closes a '{' before it"
                raise GraftError("GC002", f"{quoted(text)} closes a brace that it never opened", hint=hint)
            (n, size), (m, inner) = current[-2], _sum(done.pop(), current.pop())
            if n * m > BRANCHES:
                raise _too_many(text, f"has more than {BRANCHES:,} alternatives")
            current[-1] = (n * m, size * m + inner * n)
        elif piece == "," and len(done) > 1:
            done[-1], current[-1] = _sum(done[-1], current[-1]), (1, 0)
        else:
            n, size = current[-1]
            current[-1] = (n, size + n * len(piece))
    if len(done) > 1:
        hint = "each '{' needs a '}' after it"
        raise GraftError("GC002", f"{quoted(text)} opens a brace that it never closes", hint=hint)
    return current[0]


def _sum(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return one[0] + other[0], one[1] + other[1]


def _too_many(text: str, what: str) -> GraftError:
    return GraftError("GC009", f"{quoted(text)} {what}", hint="use '*' for any characters, or a list of patterns")


def expand_braces(text: str) -> list[str]:
    """Return the alternatives of ``a.{b,c{d,e}}`` in order: ``a.b``, ``a.cd``, ``a.ce``; without braces, the text.

    Raises:
        GraftError: as :func:`measure_braces`.
    """
    measure_braces(text)
    done: list[list[str]] = [[]]
    current: list[list[str]] = [[""]]
    for piece in _BRACES.findall(text):
        if piece == "{":
            done.append([])
            current.append([""])
        elif piece == "}":
            inner = done.pop() + current.pop()
            current[-1] = [a + b for a in current[-1] for b in inner]
        elif piece == "," and len(done) > 1:
            done[-1] += current[-1]
            current[-1] = [""]
        else:
            current[-1] = [a + piece for a in current[-1]]
    return list(dict.fromkeys(current[0]))


def branches(value: Any, path: str, *, braces: bool = True) -> Iterator[tuple[str, Any, Any]]:
    """Yield the alternatives of the items of a field: the path of the item, the item, and the alternative.

    Args:
        value: nothing, one item or several.
        path: the path of the field.
        braces: whether items have braces to expand; otherwise each is its own only alternative.
    """
    for index, item in enumerate(as_items(value)):
        place = f"{path}[{index}]" if isinstance(value, list | tuple) else path
        yield from ((place, item, branch) for branch in (expand_braces(item) if braces else [item]))


def quoted_branch(branch: str, item: str) -> str:
    """Return an alternative as shown in messages, with the item that it was expanded from."""
    return quoted(branch) if branch == item else f"{quoted(branch)} of {quoted(item)}"


@lru_cache(maxsize=512)
def glob_to_regex(glob: str) -> re.Pattern[str]:
    """Compile a glob to a regex, to be used with ``fullmatch`` on a dotted module path.

    ``*`` matches any characters within one segment, ``**`` as a whole segment any number of segments (including none),
    ``{a,b}`` either. Everything else matches itself. Matching takes time at most quadratic in the length of the path,
    however many stars there are: the text between two stars is matched where it first occurs, without backtracking.

    Raises:
        GraftError: GC002 for unbalanced braces, GC009 as :func:`expand_braces`.
    """
    return re.compile("|".join(f"(?:{_one_glob(branch)})" for branch in expand_braces(glob)))


def _one_glob(glob: str) -> str:
    runs: list[list[str]] = [[]]  # of segments, separated by **
    for segment in glob.split("."):
        if segment != "**":
            runs[-1].append(_segment(segment))
        elif runs[-1] or len(runs) == 1:
            runs.append([])
    first, *others = runs
    if not any(runs):
        return r".*"
    out = r"\.".join(first)
    for number, run in enumerate(others):
        dotted = bool(first) or number > 0
        between = r"(?:\.[^.]+)*" if dotted else r"(?:[^.]+\.)*"
        matched = (r"\." if dotted else "") + r"\.".join(run)
        if not run:
            out += between
        elif run is others[-1]:
            out += between + matched
        else:
            out += f"(?>{between}?{matched})"
    return out


def _segment(segment: str) -> str:
    """Return the regex of one segment of a glob, up to the end of the segment."""
    head, *others = [re.escape(part) for part in re.split(r"\*+", segment)]
    if not others:
        return f"{head}(?![^.])"
    return f"{head}{''.join(f'(?>[^.]*?{part})' for part in others[:-1])}[^.]*{others[-1]}(?![^.])"


def parse_layer(entry: int | str) -> int | slice:
    """Parse one entry of ``layers`` with `parse_slice`."""
    return parse_slice(entry, "layer")


def parse_slice(entry: int | str, thing: str) -> int | slice:
    """Parse an index of some ``thing``, or ``"start:stop"`` or ``"start:stop:step"`` as in Python.

    Raises:
        GraftError: GC002 if the text is neither.
    """
    if isinstance(entry, int):
        return entry
    if re.fullmatch(r"\s*-?[0-9]{1,9}\s*", entry):
        return int(entry)
    match = _SLICE.fullmatch(entry)
    if match is None:
        hint = f'write a {thing} such as 3 or -1, a slice such as "0:6", or a list of them'
        raise GraftError("GC002", f"{quoted(entry)} is neither a {thing} nor a slice of {thing}s", hint=hint)
    start, stop, step = (None if part is None else int(part) for part in match.groups())
    if step == 0:
        raise GraftError("GC002", f"the slice {quoted(entry)} has step 0", hint="a step is at least 1")
    return slice(start, stop, step)


def layer_indices(entry: int | str, depth: int) -> frozenset[int]:
    """Return the layers, from 0, that an entry names in a stack of ``depth`` layers.

    Negative ones count from the end. An index outside the stack names none; a slice is clipped, as in Python.

    Raises:
        GraftError: GC002 if the entry is not well formed.
    """
    parsed = parse_layer(entry)
    if isinstance(parsed, slice):
        return frozenset(range(*parsed.indices(depth)))
    index = parsed + depth if parsed < 0 else parsed
    return frozenset((index,)) if 0 <= index < depth else frozenset()


def as_items(value: Any) -> tuple[Any, ...]:
    """Return the items of a field as a tuple: none, one or several."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def smallest_fix(text: str, wrong: str, right: str) -> tuple[str, str] | None:
    """Return the smallest change to ``text`` that turns ``wrong`` into ``right``: all of it or one segment.

    Return None if the change is ambiguous.
    """
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
    """Return a hint for a glob that matches none of ``modules``, and the change to make in ``written``."""
    if any(mark in glob for mark in "?["):
        return "'?' and '[...]' stand for themselves here; use regex instead", None
    for better in (f"**.{glob}", f"{glob}.**", f"**.{glob}.**"):
        count = sum(1 for m in modules if glob_to_regex(better).fullmatch(m))
        if count:
            fix = (glob, better) if glob == written else None
            return f"{quoted(better)} matches {counted(count, things)}", fix
    close = nearest(glob, _like(glob, modules))
    if not close:
        return None, None
    return f"did you mean {' or '.join(quoted(c) for c in close)}?", smallest_fix(written, glob, close[0])


def _like(glob: str, modules: Sequence[str]) -> list[str]:
    """Return module paths in the style of a glob: numbers as ``*``, and with a leading ``**`` if the glob has one."""
    segments = glob.split(".")
    numbered = any(s.isdigit() for s in segments)
    paths = [m.split(".") if numbered else ["*" if s.isdigit() else s for s in m.split(".")] for m in modules]
    if segments[0] == "**" and len(segments) > 1:
        tail = len(segments) - 1
        paths = [["**", *path[-tail:]] for path in paths]
    return list(dict.fromkeys(".".join(path) for path in paths))


def match_modules(globs: Sequence[str], modules: Sequence[str], where: str = "train") -> list[str]:
    """Return the module paths that any of the globs matches, in the order of ``modules``. See `modules_by_glob`."""
    matched = {module for hits in modules_by_glob(globs, modules, where) for module in hits}
    return [module for module in modules if module in matched]


def modules_by_glob(globs: Sequence[str], modules: Sequence[str], where: str) -> list[list[str]]:
    """Return the module paths that each of a list of globs matches, in the order of ``modules``.

    Args:
        globs: patterns, as for ``Spec.train``.
        modules: the paths of all modules.
        where: path of the list in the spec, named in errors.

    Raises:
        GraftError: GC011 if a glob or a brace branch matches no module.
    """
    matched: list[list[str]] = []
    for index, glob in enumerate(globs):
        own: set[str] = set()
        for branch in expand_braces(glob):
            fits = glob_to_regex(branch).fullmatch
            hits = {module for module in modules if fits(module)}
            if not hits:
                shown = quoted_branch(branch, glob)
                message = f"{where} {shown} matches none of the {counted(len(modules), 'module')}"
                hint, fix = suggest(branch, glob, modules, "module")
                raise GraftError("GC011", message, place=Place(path=f"{where}[{index}]"), hint=hint, fix=fix)
            own |= hits
        matched.append([module for module in modules if module in own])
    return matched


def write_items(value: object) -> str:
    """Format a field as in a spec: an item, or a list in brackets."""
    items = [repr(v) if isinstance(v, str) else str(v) for v in as_items(value)]
    return items[0] if len(items) == 1 and not isinstance(value, tuple) else f"[{', '.join(items)}]"


def layer_entries(layers: Sequence[int]) -> list[int | str]:
    """Return sorted layers as entries of ``layers:``, with consecutive ones as slices."""
    return [first if first == last else f"{first}:{last + 1}" for first, last in consecutive(layers)]


def write_layers(layers: Sequence[int]) -> str:
    """Format the result of `layer_entries` as in a spec."""
    return "[" + ", ".join(f'"{e}"' if isinstance(e, str) else str(e) for e in layer_entries(layers)) + "]"
