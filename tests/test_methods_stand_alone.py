"""A method consists of two modules, and no other module of the package names it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import graftc
from graftc.specs.registry import method_specs

PACKAGE = Path(graftc.__file__).parent
ROOMS = ("specs/methods", "passes/methods")

FORMATS = {
    "lora": "what other tools read: adapters are converted to it and back",
    "prefix": "contents of a cache, which others write as well",
    "alora": "the positions of its invocation are part of a GGUF adapter",
}
"""Methods that other modules name, and why."""

WORDS = {"full", "mask", "norms", "prefix", "prompt", "pruning", "rows", "bottleneck"}
"""Tags that are also words for other things."""

TABLES = {"applications/planner/table.py": "rows that users ask for by a method's name"}
"""Modules that contain tags as data, and why."""


def modules() -> Iterator[tuple[str, ast.Module]]:
    """Yield every module of the package outside of the rooms of methods, with its path."""
    for path in sorted(PACKAGE.rglob("*.py")):
        name = path.relative_to(PACKAGE).as_posix()
        if not name.startswith(ROOMS):
            yield name, ast.parse(path.read_text(encoding="utf-8"))


def test_no_other_module_imports_a_method() -> None:
    """Only methods that are also formats are imported elsewhere."""
    pattern = re.compile(r"graftc\.(?:specs|passes)\.methods\.(?!bases\b)(\w+)")
    imported: dict[str, list[str]] = {}
    for name, tree in modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and (match := pattern.fullmatch(node.module)):
                imported.setdefault(match[1], []).append(name)
    assert imported.keys() == FORMATS.keys(), imported


def test_no_other_module_contains_a_tag() -> None:
    """No string in another module is the tag of a method that imports do not show."""
    tags = set(method_specs()) - FORMATS.keys() - WORDS
    named = [
        (name, node.lineno, node.value)
        for name, tree in modules()
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and node.value in tags
    ]
    assert {name for name, _, _ in named} == TABLES.keys(), named
