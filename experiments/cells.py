"""Cells: one run of a part each, identified by what it computes, and the digest of everything it depends on."""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import io
import json
import tokenize
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from graftc.version import __version__

ROOT = Path(__file__).parents[1]
METHODS = ("graftc.specs.methods", "graftc.passes.methods")
PACKAGES = ("torch", "transformers", "peft")
SHOWN = 8
"""How many characters of a digest are shown."""


@dataclass(frozen=True)
class Cell:
    """One run of a part.

    Attributes:
        part: the part's name, which is also that of its file.
        name: the name of the row: a method or a variant of one.
        method: the tag of the method; its modules are code that the cell depends on.
        settings: everything else that the part needs to know.
        model: a model of `experiments.sources`.
        dtype: of the model.
        rate: the learning rate.
        seed: of everything that is drawn.
        steps: the number of training steps.
    """

    part: str
    name: str
    method: str
    model: str
    dtype: str
    rate: float
    seed: int
    steps: int
    settings: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Return the cell as data."""
        return asdict(self)

    def __str__(self) -> str:
        task = f"{self.settings['task']}/" if "task" in self.settings else ""
        return f"{self.part}/{self.model}/{self.dtype}/{task}{self.name}/{self.rate:g}/{self.seed}"


Known = Callable[[Cell], Mapping[str, Any] | None]
"""A function that returns the figures of a cell, or None if they have not been computed yet."""


@dataclass(frozen=True)
class Part:
    """A part of the results.

    Attributes:
        name: its name on the command line.
        compute: ``module:function``; the function takes a cell as data and returns its figures. What it puts into
            ``times`` differs between runs, and is stored with the times.
        files: ``module:function``; the function takes a cell and returns the files that its figures depend on.
        plan: a function that returns the part's cells, in the order of its file, as far as they follow from the figures
            that are known. A sweep of learning rates is followed by further seeds at the best one.
    """

    name: str
    compute: str
    files: str
    plan: Callable[[Known], tuple[Cell, ...]]


@dataclass(frozen=True)
class Sources:
    """Everything besides the cell itself that its figures depend on.

    Attributes:
        code: digest of the modules in `modules_of`.
        data: digest of the model's files.
        versions: those of graftc and of the libraries below it.
    """

    code: str
    data: str
    versions: Mapping[str, str]

    def digest(self, cell: Cell) -> str:
        """Return the digest of a cell with these sources."""
        return _sha256(canonical({"cell": cell.to_json(), **asdict(self)}))


def sources_of(part: Part, cell: Cell) -> Sources:
    """Return what a cell of a part depends on, as it is now."""
    files = function_of(part.files)(cell)
    return Sources(code_digest(part, cell), data_digest(tuple(files)), versions())


def code_digest(part: Part, cell: Cell) -> str:
    """Return the digest of the code of `modules_of`, without comments, docstrings and blank lines."""
    names = modules_of(part.compute.partition(":")[0], cell.method)
    return _sha256(canonical({name: code_of(_path(name).read_text(encoding="utf-8")) for name in names}))


@cache
def modules_of(computing: str, method: str) -> tuple[str, ...]:
    """Return the names of the modules that the figures of a method depend on, sorted.

    These are the module that computes them, the method's spec and its pass, and what these import in turn, as far as it
    is in the first one's package, in `graftc.specs.methods` or in `graftc.passes.methods`. Imports for type checkers
    only do not count. The rest of graftc counts by its version alone.
    """
    own = computing.rpartition(".")[0]
    starts = [computing, *(f"{package}.{method}" for package in METHODS)]
    closure: set[str] = set()
    waiting = [name for name in starts if _path(name).is_file()]
    while waiting:
        name = waiting.pop()
        if name not in closure:
            closure.add(name)
            imported = _imports(ast.parse(_path(name).read_text(encoding="utf-8")).body)
            waiting += [n for n in imported if n.startswith((f"{own}.", *(f"{p}." for p in METHODS))) and _is_module(n)]
    return tuple(sorted(closure))


def _imports(nodes: Sequence[ast.AST]) -> Iterator[str]:
    """Yield the names that statements import, except below ``if TYPE_CHECKING``."""
    for node in nodes:
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and node.module is not None:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            yield from _imports(list(ast.iter_child_nodes(node)))


def _path(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def _is_module(name: str) -> bool:
    return _path(name).is_file()


@cache
def code_of(source: str) -> str:
    """Return Python source without comments, strings that are statements, and blank lines."""
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            assert node.end_lineno is not None
            lines[node.lineno - 1 : node.end_lineno] = [""] * (node.end_lineno - node.lineno + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


@cache
def data_digest(files: tuple[Path, ...]) -> str:
    """Return the digest of files by their names and contents."""
    digests = {}
    for path in files:
        with path.open("rb") as content:
            digests[path.name] = hashlib.file_digest(content, "sha256").hexdigest()
    return _sha256(canonical(digests))


@cache
def versions() -> Mapping[str, str]:
    """Return the versions of graftc and of the libraries that compute the figures."""
    return {"graftc": __version__, **{name: importlib.metadata.version(name) for name in PACKAGES}}


def canonical(data: Any) -> str:
    """Return data as JSON with sorted keys and without spaces."""
    return json.dumps(data, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def function_of(name: str) -> Any:
    """Return the function that ``module:function`` names."""
    module, _, function = name.partition(":")
    return getattr(importlib.import_module(module), function)


def compute(function: str, cell: Cell) -> dict[str, Any]:
    """Return the figures of a cell by a part's ``module:function``."""
    figures: dict[str, Any] = function_of(function)(cell.to_json())
    return figures
