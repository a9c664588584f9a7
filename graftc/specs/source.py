"""Parse spec text with positions: YAML and JSON become plain data plus a line and column for every path.

YAML is read with the types of YAML 1.2: ``1:6`` and ``no`` are strings, ``1e-3`` is a number, ``010`` is ten.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeAlias

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import printable, quoted, shortened

Path: TypeAlias = tuple[str | int, ...]
_STEP = re.compile(r'\.?([^.\[\]"]+)|\[(\d+)\]|\.?\["((?:[^"\\]|\\.)*)"\]')
_PLAIN_KEY = re.compile(r'[^.\[\]"]+')
_LINE = 200
"""Maximum length of a line shown in an error, in characters; a longer one is not shown."""

FILE = 256 * 1024
"""Maximum number of characters in a spec's text, and of bytes in its file."""

DEPTH = 32
"""Maximum depth of a spec."""

VALUES = 15_000
"""Maximum number of values in a spec, including mappings and lists; aliased values count each time."""

# A dotted key, or the header of a table, with more parts than a spec may have levels.
_DOTTED = re.compile(rf"(?<![\w.\-])[\w\-]++(?:[ \t]*+\.[ \t]*+(?:[\w\-]++|\"[^\"\n]*+\"|'[^'\n]*+')){{{DEPTH},}}")


def beyond(message: str, place: Place | None = None, hint: str | None = None) -> GraftError:
    """Return the error for input that exceeds a limit."""
    return GraftError("GC009", message, place=place, hint=hint or "docs/spec.md lists the limits")


def format_path(path: Iterable[str | int]) -> str:
    """Format ``("adapt", 0, "target")`` as ``adapt[0].target``."""
    out = ""
    for step in path:
        if isinstance(step, int):
            out += f"[{step}]"
        elif _PLAIN_KEY.fullmatch(step):
            out += f".{step}" if out else step
        else:
            out += f"[{json.dumps(step)}]"
    return out


def parse_path(text: str) -> Path:
    """Parse a path that :func:`format_path` has formatted."""
    return tuple(_step(*match.groups()) for match in _STEP.finditer(text))


def _step(plain: str | None, index: str | None, quoted: str | None) -> str | int:
    if plain is not None:
        return plain
    return int(index) if index is not None else str(json.loads(f'"{quoted}"'))


@dataclass(frozen=True)
class Span:
    """The position of a value (or a key): first line and column, last line and end column, all from 0."""

    line: int
    column: int
    end_line: int
    end_column: int


@dataclass
class Source:
    """The text and the positions that the values of a spec came from; empty for a spec written in Python.

    It equals any other Source.
    """

    file: str | None = None
    lines: tuple[str, ...] = ()
    values: dict[Path, Span] = field(default_factory=dict)
    keys: dict[Path, Span] = field(default_factory=dict)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Source)

    __hash__ = None  # type: ignore[assignment]

    def span(self, path: Path, *, key: bool = False) -> Span | None:
        """Return the span of the value (or the key) at ``path``, or of the nearest enclosing value."""
        if key and path in self.keys:
            return self.keys[path]
        while path and path not in self.values:
            path = path[:-1]
        return self.values.get(path)

    def place(self, path: str, *, key: bool = False) -> Place:
        """Return the place of a path such as ``adapt[0].target.role``, with line and column if they are known."""
        span = self.span(parse_path(path), key=key)
        return Place(self.file, path=path) if span is None else self.at(span.line, span.column, path)

    def at(self, line: int, column: int, path: str = "") -> Place:
        """Return the place of a line and a column, counted from 0."""
        return Place(self.file, line + 1, column + 1, path, self.line(line))

    def line(self, number: int) -> str | None:
        """Return a line of the text, counted from 0; None if there is none or it is too long to be shown."""
        return self.lines[number] if number < len(self.lines) and len(self.lines[number]) <= _LINE else None

    def locate(self, error: GraftError) -> GraftError:
        """Return the error with file, line, column and corrected line filled in from its path."""
        place = error.place
        if place is None or place.line is not None or not (self.file or self.values):
            return error
        details = tuple(self.locate(d) if isinstance(d, GraftError) else d for d in error.details)
        key = error.code == "GC003"
        corrected = error.corrected
        if corrected is None and error.fix is not None:
            corrected = self._corrected(parse_path(place.path), *error.fix, key=key)
        return error.changed(place=self.place(place.path, key=key), details=details, corrected=corrected)

    def _corrected(self, path: Path, wrong: str, right: str, *, key: bool) -> str | None:
        span = (self.keys if key else self.values).get(path)
        line = None if span is None else self.line(span.line)
        if span is None or line is None or span.line != span.end_line:
            return None
        written = line[span.column : span.end_column]
        if written.count(wrong) != 1:
            return None
        return line[: span.column] + written.replace(wrong, right) + line[span.end_column :]


def read_yaml(text: str, file: str | None = None) -> tuple[Any, Source]:
    """Read YAML text as plain data with positions.

    Raises:
        GraftError: GC001 with line and column if it is not YAML, repeats a key, or has an unsupported tag or several
            documents; GC009 if the text, its depth or the number of its values exceeds a limit.
    """
    import yaml

    source = _source(text, file)
    try:
        node = yaml.compose(text, Loader=_loader(source))
        return (None if node is None else _Build(source).value(node, ())), source
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line, column = (mark.line, mark.column) if mark is not None else (0, 0)
        problem = error.problem or error.context or "it cannot be parsed"
        _unreadable(source, f"not valid YAML: {problem}", line, column, *_yaml_advice(source, line, problem))
    except yaml.YAMLError as error:
        reason = str(getattr(error, "reason", error))
        before = text[: getattr(error, "position", 0)]
        column = len(before) - (before.rfind("\n") + 1)
        _unreadable(source, f"not valid YAML: {reason}", before.count("\n"), column)


def read_json(text: str, file: str | None = None) -> tuple[Any, Source]:
    """Read JSON text as plain data with positions.

    Raises:
        GraftError: GC001 with line and column; GC009 as for YAML.
    """
    source = _source(text, file)
    try:
        data = json.loads(text, parse_constant=_no_constant, parse_int=_integer)
    except json.JSONDecodeError as error:
        _unreadable(source, f"not valid JSON: {error.msg}", error.lineno - 1, error.colno - 1)
    except ValueError as error:
        _unreadable(source, f"not valid JSON: {error}", 0, 0)
    except RecursionError:
        raise _too_deep(source) from None
    # JSON with tabs replaced by spaces is YAML, and only the YAML composer reports positions and duplicate keys.
    _, positions = read_yaml(text.replace("\t", " "), file)
    positions.lines = source.lines
    return data, positions


def read_toml(text: str, file: str | None = None) -> tuple[Any, Source]:
    """Read TOML text as plain data; places contain the file and the path, without line and column.

    Raises:
        GraftError: GC001 with line and column; GC009 as for YAML.
    """
    source = _source(text, file)
    if match := _DOTTED.search(text):  # tomllib would take time quadratic in the number of parts
        raise _too_deep(source, text.count("\n", 0, match.start()))
    try:
        return tomllib.loads(text), source
    except RecursionError:
        raise _too_deep(source) from None
    except ValueError as error:  # TOMLDecodeError, or for example an integer of too many digits
        match = re.search(r"^(.*) \(at line (\d+), column (\d+)\)$", str(error))
        reason, line, column = match.groups() if match else (str(error), str(max(len(source.lines), 1)), "1")
        _unreadable(source, f"not valid TOML: {reason}", int(line) - 1, int(column) - 1)


def _source(text: str, file: str | None) -> Source:
    if len(text) > FILE:
        raise beyond(f"the spec has {len(text):,} characters, more than {FILE:,}", Place(file))
    return Source(file, tuple(text.splitlines()))


def _too_deep(source: Source, line: int = 0, column: int = 0) -> GraftError:
    return beyond(f"the spec is nested deeper than {DEPTH} levels", source.at(line, column))


def _integer(text: str) -> int:
    """Parse an integer of JSON or YAML.

    An integer of more than 100 characters exceeds every limit and is replaced with another huge one, since Python
    refuses to parse thousands of digits.
    """
    return int(text) if len(text) <= 100 else 1 << len(text)


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _unreadable(
    source: Source,
    message: str,
    line: int,
    column: int,
    hint: str | None = None,
    corrected: str | None = None,
) -> NoReturn:
    raise GraftError("GC001", message, place=source.at(line, column), hint=hint, corrected=corrected) from None


# A word of a flow collection or a block value, with braces and their content.
_BRACED = r"[^\s,\[\]{}#\"']*(?:\{[^\s{}]*\}[^\s,\[\]{}#\"']*)"
_QUOTABLE: tuple[tuple[re.Pattern[str], re.Pattern[str], str], ...] = (
    (
        re.compile(r"alias|but found '[*.]'"),
        re.compile(rf"(?<=[\s\[{{,])(?=\*){_BRACED}*|(?<=[\s\[{{,])\*[^\s,\[\]{{}}#\"']+"),
        "quote a pattern that starts with '*'",
    ),
    (re.compile(r"but got '\{'"), re.compile(rf"(?<=[\s\[{{,])(?!\{{){_BRACED}+"), "quote a pattern that has braces"),
    # Within braces or brackets a colon before a comma or the end starts a value.
    (re.compile(r"(got|found) ':'"), re.compile(r"(?<=[\s\[{,])-?\d*:(?:-?\d+)?(?=[\s,\]}])"), "quote a slice"),
)


def _yaml_advice(source: Source, line: int, problem: str) -> tuple[str | None, str | None]:
    """Return a hint and the corrected line for text that is often left unquoted."""
    text = source.line(line) or ""
    if "'\\t'" in problem:
        return "indent with spaces, not tabs", None
    for trouble, word, hint in _QUOTABLE:
        match = word.search(text) if trouble.search(problem) else None
        if match:
            return hint, f'{text[: match.start()]}"{match.group()}"{text[match.end() :]}'
    return None, None


_CORE_TYPES: tuple[tuple[str, str, str], ...] = (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        "-+.0123456789",
    ),
)


def core_resolvers() -> Iterator[tuple[str, re.Pattern[str], list[str]]]:
    """Yield the implicit types of YAML 1.2 as ``(tag, pattern, first characters)``, for a loader or a dumper."""
    for name, pattern, first in _CORE_TYPES:
        firsts = ["" if c == "\0" else c for c in first]
        yield f"tag:yaml.org,2002:{name}", re.compile(f"^(?:{pattern})$"), firsts


def _loader(source: Source) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """A loader with YAML 1.2's types, and with limits on depth and on the number of nodes."""

        depth = count = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            self.depth, self.count = self.depth + 1, self.count + 1
            if self.depth > DEPTH:
                raise _too_deep(source, mark.line, mark.column)
            if self.count > 2 * VALUES:
                raise _too_many(source, mark.line, mark.column)
            try:
                return super().compose_node(parent, index)
            finally:
                self.depth -= 1

    Loader.yaml_implicit_resolvers = {}
    for tag, pattern, firsts in core_resolvers():
        Loader.add_implicit_resolver(tag, pattern, firsts)
    return Loader


def _too_many(source: Source, line: int, column: int, why: str = "") -> GraftError:
    return beyond(f"the spec contains more than {VALUES:,} values{why}", source.at(line, column))


class _Build:
    """Builds plain data from composed nodes, and records their spans."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.open: set[int] = set()
        self.count = 0

    def value(self, node: Any, path: Path) -> Any:
        import yaml

        self.count += 1
        if self.count > VALUES:
            raise _too_many(self.source, node.start_mark.line, node.start_mark.column, " with aliases expanded")
        if len(path) > DEPTH:
            raise _too_deep(self.source, node.start_mark.line, node.start_mark.column)
        if id(node) in self.open:
            self.fail(node, "an alias refers to a value that contains it")
        self.source.values[path] = _span(node)
        if isinstance(node, yaml.ScalarNode):
            return self.scalar(node)
        self.open.add(id(node))
        try:
            if isinstance(node, yaml.SequenceNode):
                self.tag(node, "seq")
                return [self.value(item, (*path, i)) for i, item in enumerate(node.value)]
            self.tag(node, "map")
            return self.mapping(node, path)
        finally:
            self.open.discard(id(node))

    def mapping(self, node: Any, path: Path) -> dict[str, Any]:
        import yaml

        out: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.fail(key_node, "a key must be a plain word")
            key = str(key_node.value)
            if key in out:
                self.fail(key_node, f"the key {quoted(key)} is repeated")
            out[key] = self.value(value_node, (*path, key))
            self.source.keys[(*path, key)] = _span(key_node)
        return out

    def scalar(self, node: Any) -> Any:
        text: str = node.value
        kind = str(node.tag).removeprefix("tag:yaml.org,2002:")
        if kind == "str":
            return text
        if kind == "null":
            return None
        try:
            if kind == "bool":
                return ("false", "true").index(text.lower()) == 1
            if kind == "int":
                return int(text, 0) if text[:2] in ("0o", "0x") else _integer(text)
            if kind == "float":
                return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError:
            self.fail(node, f"{quoted(text)} is not {'an' if kind == 'int' else 'a'} {kind}")
        self.fail(node, f"the tag {printable(shortened(node.tag))} is not supported")

    def tag(self, node: Any, kind: str) -> None:
        if node.tag != f"tag:yaml.org,2002:{kind}":
            self.fail(node, f"the tag {printable(shortened(node.tag))} is not supported")

    def fail(self, node: Any, message: str) -> NoReturn:
        mark = node.start_mark
        _unreadable(self.source, f"not a readable spec: {message}", mark.line, mark.column)


def _span(node: Any) -> Span:
    start, end = node.start_mark, node.end_mark
    return Span(start.line, start.column, end.line, end.column)
