"""Private names of libraries in Python code, found in its syntax."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator, Set
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[2]
OURS = re.compile(r"_graftc\w*")
"""Names that graftc itself puts on objects of libraries."""
DOCUMENTED = frozenset({"_asdict", "_fields", "_getframe", "_make", "_replace"})
"""Names of Python's library that its documentation describes."""
ANYWHERE = frozenset({"torch._ops.OpOverload"})
"""Names that may be used anywhere."""
BY_NAME = frozenset({"attrgetter", "delattr", "getattr", "hasattr", "methodcaller", "object", "setattr"})
"""Functions that reach an attribute by its name; ``object`` is that of `unittest.mock.patch`."""


class Use(NamedTuple):
    """A private name, and the line that it is in."""

    name: str
    line: int


def is_private(name: str) -> bool:
    return bool(re.fullmatch(r"_[a-zA-Z]\w*[^_\W]", name)) and not OURS.fullmatch(name) and name not in DOCUMENTED


@cache
def library_names() -> frozenset[str]:
    """Return the private names of the classes of libraries that graftc's own derive from or go through."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

    classes: list[Any] = [torch.nn.Module, torch.Tensor, torch.optim.Optimizer, torch.fx.Interpreter, torch.fx.Graph]
    classes += [
        TorchDispatchMode,
        torch.overrides.TorchFunctionMode,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    ]
    names = {*vars(torch.nn.Module()), *(name for cls in classes for name in dir(cls))}
    return frozenset(filter(is_private, names))


def _dotted(node: ast.AST) -> str:
    parts: list[str] = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([*([node.id] if isinstance(node, ast.Name) else [""]), *reversed(parts)])


def _text(node: ast.expr) -> str:
    """Return a text, one that is put together with an ``x`` for each part that varies; empty if it is not a text."""
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) if isinstance(part, ast.Constant) else "x" for part in node.values)
    return str(node.value) if isinstance(node, ast.Constant) else ""


def uses(
    source: str, library: Set[str], *, compat: bool = False, inherited: Callable[[str], Set[str]] | None = None
) -> Iterator[Use]:
    """Yield the private names of libraries that a file uses: what it imports, reaches by name, mentions and overrides.

    Members of other objects are ruff's (SLF001), so that only those of the object itself are looked at here, and what
    follows ``_ops``.

    Args:
        source: the text of the file.
        library: private names of libraries, which no text may be.
        compat: whether to yield members of other objects, and all texts that may be names, too.
        inherited: returns the private names that a class of the file has from libraries, which no member of its own may
            be; by default ``library`` for every class.
    """
    tree = ast.parse(source)
    aside = {id(part) for node in ast.walk(tree) for part in (*_documentation(node), *_ends(node), *_parts(node))}
    for node, owner in _with_classes(tree, ""):
        names: list[str] = []
        own = library if inherited is None else inherited(owner)
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            paths = [f"{module}{alias.name}" for alias in node.names]
            names = [n for path in paths if path not in ANYWHERE for n in path.split(".")]
        elif isinstance(node, ast.Attribute):
            path = _dotted(node)
            if node.attr in own and path == f"self.{node.attr}":
                names = [node.attr]
            elif "._ops." in f".{path}" and path not in ANYWHERE:
                names = ["_ops"]
            elif compat and path != f"self.{node.attr}":
                names = [node.attr]
        elif isinstance(node, ast.Call):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            names = [part for text in map(_text, node.args) for part in text.split(".") if called in BY_NAME]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in aside:
            names = [node.value] if compat or node.value in library else []
        elif isinstance(node, ast.ClassDef):
            theirs = library if inherited is None else inherited(node.name)
            names = [name for part in node.body for name in _defined(part) if name in theirs]
        yield from (Use(name, node.lineno) for name in names if is_private(name))


def inherited_by(module: str) -> Callable[[str], Set[str]]:
    """Return a function that returns the private names which a class of a module has from libraries, by its name.

    Of classes that are not at the top of the module, and of a module whose library is not installed, all are assumed.
    """
    from torch import nn

    @cache
    def names(cls: str) -> Set[str]:
        try:
            own = vars(importlib.import_module(module))
        except ModuleNotFoundError as error:
            if str(error.name).partition(".")[0] == "graftc":
                raise
            return library_names()
        if not isinstance(own.get(cls), type):
            return library_names()
        bases = [base for base in own[cls].__mro__ if base.__module__.partition(".")[0] not in ("graftc", "builtins")]
        instance = vars(nn.Module()) if nn.Module in bases else {}
        return frozenset(filter(is_private, {*instance, *(name for base in bases for name in vars(base))}))

    return lambda cls: names(cls) if cls else frozenset()


def _with_classes(node: ast.AST, owner: str) -> Iterator[tuple[Any, str]]:
    """Yield every node below one, with the name of the innermost class that it is in."""
    for child in ast.iter_child_nodes(node):
        yield child, owner
        yield from _with_classes(child, child.name if isinstance(child, ast.ClassDef) else owner)


def _parts(node: ast.AST) -> list[ast.expr]:
    """Return the parts of a text that is put together."""
    return list(node.values) if isinstance(node, ast.JoinedStr) else []


def _documentation(node: ast.AST) -> list[ast.AST]:
    """Return the texts that are statements of their own, which document something."""
    return [part.value for part in getattr(node, "body", ()) if isinstance(part, ast.Expr)] if _has_body(node) else []


def _ends(node: ast.AST) -> list[ast.expr]:
    """Return the texts that others are compared with at their beginning or end only."""
    compared = isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    return list(node.args) if compared and node.func.attr in ("startswith", "endswith") else []


def _has_body(node: ast.AST) -> bool:
    return isinstance(getattr(node, "body", None), list)


def _defined(node: ast.AST) -> list[str]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return [node.name]
    if isinstance(node, ast.AnnAssign):
        return [_dotted(node.target)]
    return [_dotted(target) for target in node.targets] if isinstance(node, ast.Assign) else []


def files(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def used_in_compat() -> set[str]:
    """Return the private names that `graftc.compat` uses."""
    texts = [file.read_text(encoding="utf-8") for file in files("graftc/compat")]
    return {use.name for text in texts for use in uses(text, library_names(), compat=True)}
