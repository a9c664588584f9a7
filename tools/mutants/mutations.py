"""Small changes of a Python file, each as a replacement of one span of its text."""

from __future__ import annotations

import ast
import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

OPPOSITES = {
    "==": "!=",
    "!=": "==",
    "<": "<=",
    "<=": "<",
    ">": ">=",
    ">=": ">",
    "is": "is not",
    "is not": "is",
    "in": "not in",
    "not in": "in",
}
ARITHMETIC = {"+": "-", "-": "+", "*": "/", "/": "*", "//": "*", "%": "*", "**": "*", "|": "&", "&": "|", "^": "&"}
EXCHANGED = {
    "min": "max",
    "any": "all",
    "amin": "amax",
    "argmin": "argmax",
    "minimum": "maximum",
    "floor": "ceil",
    "first": "last",
}
EXCHANGED |= {new: old for old, new in EXCHANGED.items()}

_COMPARISON = re.compile(r"==|!=|<=|>=|<|>|\bis\s+not\b|\bnot\s+in\b|\bis\b|\bin\b")
_OPERATOR = re.compile(r"\*\*|//|[-+*/%|&^]")
_CONNECTIVE = re.compile(r"\b(and|or)\b")

_HINTS = frozenset({"strict", "maxsize", "non_blocking", "copy", "stacklevel", "buffering", "encoding"})
"""Keywords that guard or speed up a call without changing what a right call returns."""
_QUIET = frozenset(
    {"collect", "empty_cache", "cache_clear", "warn", "warning", "info", "debug", "print", "tell", "freeze"}
)
"""Calls for memory, speed or messages."""
_TYPES = frozenset({"isinstance", "issubclass", "cast", "TypeVar", "getattr", "hasattr"})
"""Calls whose arguments, exchanged or changed, are errors of type that say nothing about tests."""


@dataclass(frozen=True)
class Mutation:
    """A change of a file: ``text[start:end]`` becomes ``new``.

    Attributes:
        kind: what is changed, such as ``comparison``.
        scope: the qualified name of the function or class around it, empty for the module.
        line: the number of the first changed line, from 1.
        start, end: the span, in characters.
        old, new: the text of the span before and after.
    """

    kind: str
    scope: str
    line: int
    start: int
    end: int
    old: str
    new: str

    def applied(self, text: str) -> str:
        """Return the file's text with this change."""
        return text[: self.start] + self.new + text[self.end :]

    def compiles(self, text: str) -> bool:
        """Return whether the changed file is valid Python."""
        try:
            compile(self.applied(text), "mutant", "exec", dont_inherit=True)
        except (SyntaxError, ValueError):
            return False
        return True

    def lines(self, text: str) -> tuple[str, str]:
        """Return the lines that the change touches, without indentation, before and after it."""
        first, last = text.rfind("\n", 0, self.start) + 1, text.find("\n", self.end)
        last = len(text) if last < 0 else last
        return text[first:last].strip(), (text[first : self.start] + self.new + text[self.end : last]).strip()

    def key(self, path: str, text: str) -> str:
        """Return a digest of the file's path, the scope, and the line above the change and its own, before and after.

        It stays while these lines do, wherever the function moves.
        """
        above = text[: self.start].splitlines()[: self.line - 1][-1:]
        parts = (path, self.scope, self.kind, *(line.strip() for line in above), *self.lines(text))
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def mutations(text: str) -> list[Mutation]:
    """Return all changes of a file that this module knows, in the order of the text; `Mutation.compiles` checks one.

    Annotations, decorators, assertions, docstrings and other text, what a ``raise`` says, blocks for type checkers, and
    hints about memory or speed are left alone.

    Raises:
        SyntaxError: the text is no Python.
    """
    finder = _Finder(text)
    finder.visit(ast.parse(text))
    changes = {(one.start, one.end, one.new): one for one in finder.mutations if one.old != one.new}
    return [changes[place] for place in sorted(changes)]


class _Finder(ast.NodeVisitor):
    """Collects changes while it walks through a module."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.mutations: list[Mutation] = []
        self.scopes: list[str] = []

    @cached_property
    def lines(self) -> list[tuple[int, str]]:
        """The offset and the text of each line."""
        starts, offset = [], 0
        for line in self.text.splitlines(keepends=True):
            starts.append((offset, line))
            offset += len(line)
        return starts

    def place(self, line: int, column: int) -> int:
        """Return the character at a line and a column in bytes of UTF-8, as ``ast`` counts."""
        start, text = self.lines[line - 1]
        return start + len(text.encode()[:column].decode())

    def span(self, node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return self.place(node.lineno, node.col_offset), self.place(node.end_lineno, node.end_col_offset)

    def source(self, node: ast.expr | ast.stmt) -> str:
        start, end = self.span(node)
        return self.text[start:end]

    def add(self, kind: str, start: int, end: int, new: str) -> None:
        line = self.text.count("\n", 0, start) + 1
        self.mutations.append(Mutation(kind, ".".join(self.scopes), line, start, end, self.text[start:end], new))

    def replace(self, kind: str, node: ast.expr | ast.stmt, new: str) -> None:
        self.add(kind, *self.span(node), new)

    def between(
        self, kind: str, left: ast.expr, right: ast.expr, pattern: re.Pattern[str], new: dict[str, str]
    ) -> None:
        """Replace the operator between two operands."""
        start, end = self.span(left)[1], self.span(right)[0]
        gap = "".join(re.sub(r"#.*", lambda comment: " " * len(comment[0]), self.text[start:end]))
        match = pattern.search(gap)
        operator = " ".join(match[0].split()) if match else ""
        if match and operator in new:
            self.add(kind, start + match.start(), start + match.end(), new[operator])

    def visit_all(self, *nodes: ast.AST | None) -> None:
        for node in nodes:
            if node is not None:
                self.visit(node)

    # Statements.

    def _scope(self, node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> None:
        self.scopes.append(node.name)
        self.visit_all(*node.body)
        self.scopes.pop()

    visit_AsyncFunctionDef = visit_ClassDef = _scope  # noqa: N815

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.visit_all(*node.args.defaults, *node.args.kw_defaults)
        self._scope(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        self.visit_all(node.value)

    def visit_Assert(self, node: ast.Assert) -> None:
        """Leave assertions alone: most of them are for type checkers."""

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" in ast.unparse(node.test):
            self.visit_all(*node.orelse)
            return
        self._condition(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._condition(node.test)
        self.generic_visit(node)

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self._condition(test)
        self.generic_visit(node)

    def _condition(self, test: ast.expr) -> None:
        if not isinstance(test, ast.UnaryOp | ast.Compare | ast.Constant):
            self.replace("negation", test, f"(not ({self.source(test)}))")

    def visit_Raise(self, node: ast.Raise) -> None:
        self.replace("raise", node, "pass")

    def visit_Return(self, node: ast.Return) -> None:
        if node.value is not None and not (isinstance(node.value, ast.Constant) and node.value.value is None):
            self.replace("return", node, "return None")
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self.replace("loop", node, "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self.replace("loop", node, "break")

    def visit_Expr(self, node: ast.Expr) -> None:
        if not isinstance(node.value, ast.Call):
            self.generic_visit(node)
        elif _name(node.value.func) not in _QUIET:
            self.replace("statement", node, "pass")
            self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        if any(isinstance(target, ast.Attribute | ast.Subscript) for target in node.targets):
            self.replace("statement", node, "pass")
        self.generic_visit(node)

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.replace("statement", node, "pass")
        self.generic_visit(node)

    # Expressions.

    def visit_Compare(self, node: ast.Compare) -> None:
        for left, right in _pairs([node.left, *node.comparators]):
            self.between("comparison", left, right, _COMPARISON, OPPOSITES)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in _pairs(node.values):
            self.between("boolean", left, right, _CONNECTIVE, {"and": "or", "or": "and"})
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        if not any(_is_text(side) for side in (node.left, node.right)):
            self.between("arithmetic", node.left, node.right, _OPERATOR, ARITHMETIC)
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self.replace("negation", node, f"({self.source(node.operand)})")
        elif isinstance(node.op, ast.USub) and not isinstance(node.operand, ast.Constant):
            self.replace("arithmetic", node, f"({self.source(node.operand)})")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self.replace("constant", node, str(not node.value))
        elif isinstance(node.value, int | float):
            self.replace("constant", node, str(node.value + 1))

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        """Leave text alone, and what is put into it."""

    def visit_Subscript(self, node: ast.Subscript) -> None:
        parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
        for part in parts:
            if isinstance(part, ast.Slice):
                self._bounds(part)
        self.generic_visit(node)

    def _bounds(self, part: ast.Slice) -> None:
        for bound, change in ((part.lower, "+ 1"), (part.upper, "- 1")):
            if bound is not None:
                self.replace("slice", bound, f"({self.source(bound)}) {change}")

    def visit_Call(self, node: ast.Call) -> None:
        name = _name(node.func)
        if name in _TYPES:
            self.visit_all(*node.args[:1])
            return
        if name in EXCHANGED and isinstance(node.func, ast.Name | ast.Attribute):
            end = self.span(node.func)[1]
            self.add("exchange", end - len(name), end, EXCHANGED[name])
        for left, right in _pairs(node.args):
            if not isinstance(left, ast.Starred) and not isinstance(right, ast.Starred):
                start, end = self.span(left)[0], self.span(right)[1]
                middle = self.text[self.span(left)[1] : self.span(right)[0]]
                self.add("arguments", start, end, f"{self.source(right)}{middle}{self.source(left)}")
        self.visit_all(node.func, *node.args, *(one.value for one in node.keywords if one.arg not in _HINTS))


def _pairs(nodes: list[ast.expr]) -> Iterator[tuple[ast.expr, ast.expr]]:
    yield from itertools.pairwise(nodes)


def _name(function: ast.expr) -> str:
    """Return the last part of the name of what is called, empty where it has none."""
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str | bytes))
