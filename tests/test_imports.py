"""No module of graftc imports itself, directly or indirectly, counting imports for type checking and in functions."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import networkx as nx
import pytest

import graftc

ROOT = Path(graftc.__file__).parent

CONVENIENT = frozenset({("graftc.passes.core.ir.program", "graftc.passes.core.ir.graph_formats")})
"""`Program.to_networkx` is there for convenience and imports what it calls when it is called."""

FACADES = frozenset({"graftc", "graftc.extend", "graftc.runtime.api", "graftc.runtime.offered"})
"""Modules that users import first. Their functions import what they call, so that importing graftc takes no longer than
it has to; so do commands in `graftc.cli`, for help and listings, and packages whose names load when first used."""
LISTINGS = frozenset(
    {
        *("graftc.runtime.artifact", "graftc.runtime.onnx_generation", "graftc.specs", "graftc.specs.foreign"),
        "graftc.specs.registry",
    }
)
COMMANDS = ("graftc.cli", "graftc.applications.demo")

HEAVY = frozenset(
    {
        *("cryptography", "huggingface_hub", "onnxruntime", "peft", "quickjs", "regex", "resvg_py", "safetensors"),
        *("securesystemslib", "sklearn", "PIL", "tokenizers", "torch", "transformers", "yaml"),
    }
)
"""Packages that take long to import, or need not be there: functions may import them wherever they need them."""


class Import(NamedTuple):
    """An import statement.

    Attributes:
        importer, imported: the names of the two modules.
        local: whether the import is inside a function.
    """

    importer: str
    imported: str
    local: bool


def module_name(file: Path) -> str:
    parts = ("graftc", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(file): file for file in sorted(ROOT.rglob("*.py"))}


def imports(name: str, tree: ast.AST, local: bool = False) -> Iterator[Import]:
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.Import):
            yield from (Import(name, alias.name, local) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, f"{name} imports relatively"
            inner = (f"{child.module}.{alias.name}" for alias in child.names)
            yield from (Import(name, each if each in MODULES else child.module, local) for each in inner)
        else:
            yield from imports(name, child, local or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef))


@cache
def every_import() -> frozenset[Import]:
    trees = ((name, ast.parse(file.read_text(encoding="utf-8"))) for name, file in MODULES.items())
    return frozenset(each for name, tree in trees for each in imports(name, tree))


@cache
def edges() -> frozenset[tuple[str, str]]:
    """Return the importer and the imported of every import within graftc."""
    return frozenset(each[:2] for each in every_import() if each.imported in MODULES) - CONVENIENT


def circles(edges: set[tuple[str, str]]) -> list[list[str]]:
    components = nx.strongly_connected_components(nx.DiGraph(edges))
    return sorted(sorted(each) for each in components if len(each) > 1)


def test_imports_of_every_kind_are_seen() -> None:
    source = "import one\nif TYPE_CHECKING:\n    from two import a\ndef f():\n    from graftc.specs import io\n"
    seen = set(imports("here", ast.parse(source)))
    assert seen == {Import("here", *each) for each in (("one", False), ("two", False), ("graftc.specs.io", True))}
    assert circles({("a", "b"), ("b", "c"), ("c", "a"), ("c", "d")}) == [["a", "b", "c"]]


def test_no_module_imports_itself_along_any_way() -> None:
    assert {each[:2] for each in every_import()} >= CONVENIENT
    assert circles(set(edges())) == []


@pytest.mark.parametrize("folder", sorted({name.rpartition(".")[0] for name in MODULES} - {""}))
def test_no_folder_imports_itself_along_any_way(folder: str) -> None:
    """The imports between the files and subfolders of one folder have no cycle."""
    inner = f"{folder}."
    within = [each for each in edges() if all(name.startswith(inner) for name in each)]
    names = {tuple(name.removeprefix(inner).partition(".")[0] for name in each) for each in within}
    assert circles({(one, other) for one, other in names if one != other}) == []


def test_imports_in_functions_are_few_and_listed() -> None:
    allowed = {*FACADES, *LISTINGS}
    assert allowed <= MODULES.keys()
    odd = [
        each
        for each in every_import()
        if each.local
        and not (each.importer in allowed or f"{each.importer}.".startswith(tuple(f"{name}." for name in COMMANDS)))
        and each[:2] not in CONVENIENT
        and (package := each.imported.partition(".")[0]) not in HEAVY
        and package not in sys.stdlib_module_names
    ]
    assert odd == []
