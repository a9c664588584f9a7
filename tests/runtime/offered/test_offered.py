"""The attributes that a compiled model offers belong to plain objects, as the table of names states."""

from __future__ import annotations

import ast
import inspect
from pathlib import Path
from typing import Any

import pytest

import graftc
from graftc.runtime.offered import OFFERED
from tests.kit.models import fresh

LORA = {"method": "lora", "target": {"role": "attn.q"}, "rank": 2}
ROOT = Path(graftc.__file__).parent
WITHIN = {"results", "pause", "warn_once", "figures", "fused", "written", "evidence", "each_alone"}
WITHIN |= {"identity", "persists", "kept", "stone"}
"""Methods of what is offered that other parts of graftc call, and no user."""


@pytest.fixture(scope="module")
def llama() -> Any:
    return fresh("llama", LORA)


def test_every_name_is_offered_by_what_the_table_says(llama: Any) -> None:
    runner = llama._graftc
    for name, part in OFFERED.items():
        assert hasattr(type(part(runner)), name), name
        assert name in dir(llama)
    kinds = {type(part(runner)) for part in OFFERED.values()}
    public = {n for kind in kinds for n in dir(kind) if not n.startswith("_")}
    assert public - WITHIN == OFFERED.keys()


def test_what_is_offered_keeps_nothing_of_its_own(llama: Any) -> None:
    """An offered object is created each time it is requested, from the current Runner."""
    runner = llama._graftc
    assert all(vars(part(runner)) == {"runner": runner} for part in OFFERED.values())


def bases(tree: ast.Module) -> dict[str, list[str]]:
    classes = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            named = [base.value if isinstance(base, ast.Subscript) else base for base in node.bases]
            classes[node.name] = [ast.unparse(base).rpartition(".")[2] for base in named]
    return classes


@pytest.mark.slow
def test_no_class_has_more_than_two_bases_of_ours() -> None:
    """Capabilities of methods are not counted, as they only state what a method can do and have no fields."""
    trees = {file: bases(ast.parse(file.read_text(encoding="utf-8"))) for file in ROOT.rglob("*.py")}
    capabilities = trees[ROOT / "passes" / "core" / "method" / "capabilities.py"].keys()
    ours = {name for tree in trees.values() for name in tree} - capabilities
    several = {name: own for tree in trees.values() for name, own in tree.items() if len(ours & {*own}) > 2}
    assert several == {}
    assert any(len(own) > 2 for tree in trees.values() for own in tree.values()), "methods have several capabilities"


def test_nothing_offered_has_a_base_but_what_it_specialises() -> None:
    for kind in {type(part(None)) for part in OFFERED.values()}:  # type: ignore[arg-type]
        assert len(inspect.getmro(kind)) <= 4, kind


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    own = function.args
    named = [each.arg for each in (*own.posonlyargs, *own.args, *own.kwonlyargs) if each.arg not in ("self", "cls")]
    return len(named) + (own.vararg is not None) + (own.kwarg is not None)


@pytest.mark.slow
def test_no_private_function_has_more_than_seven_parameters() -> None:
    functions = [
        (file, node)
        for file in (ROOT / "runtime").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    private = [(file, n) for file, n in functions if n.name.startswith("_") and not n.name.startswith("__")]
    assert len(private) > 500
    assert [(file.name, node.name) for file, node in private if parameters(node) > 7] == []
