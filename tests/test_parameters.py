"""No function takes more than seven parameters, except the user interface and operators, whose schemas set theirs.

Values that belong together are passed as one.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

import pytest

import graftc
import graftc.extend
import graftc.testing
from graftc.cli.command import Command
from graftc.runtime import optim
from graftc.runtime.compiled import Compiled
from graftc.runtime.deploy.merged import Merged
from graftc.runtime.model.runner import Published
from graftc.runtime.onnx_generation.models import OnnxSeq2SeqLM
from graftc.runtime.serving.running import run_engine
from tools.docs.cli import commands

PACKAGE = Path(graftc.__file__).parent
MOST = 7


def functions(tree: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.AsyncFunctionDef]]:
    """Yield every function of a module with its qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield owner + node.name, node
            yield from functions(node, f"{owner}{node.name}.")
        else:
            yield from functions(node, f"{owner}{node.name}." if isinstance(node, ast.ClassDef) else owner)


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """Return the names of the parameters that callers pass."""
    given = node.args
    every = [*given.posonlyargs, *given.args, *given.kwonlyargs, *filter(None, (given.vararg, given.kwarg))]
    return [one.arg for one in every if one.arg not in ("self", "cls")]


def is_operator(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    """Return whether a function implements an operator, whose schema has a parameter for each argument."""
    marks = [ast.unparse(mark) for mark in node.decorator_list]
    return any(mark.startswith(("torch.library.", "operator(")) for mark in marks)


def public() -> set[CodeType]:
    """Return the code of everything that users call.

    These are functions and classes of the public modules, methods of a compiled, of a merged and of an exported model,
    and commands.
    """
    modules: list[ModuleType] = [graftc, graftc.extend, graftc.testing, optim]
    values: list[Any] = [getattr(module, name) for module in modules for name in module.__all__]
    values.append(run_engine)  # docs/serving.md shows it to users
    values += [value for cls in values if inspect.isclass(cls) for value in vars(cls).values()]
    for cls in (Compiled, Merged, OnnxSeq2SeqLM):
        values += [v.__wrapped__ if isinstance(v, Published) else v for v in vars(cls).values()]
    callbacks = [inspect.unwrap(command.callback) for command in commands().values()]
    values += [each.function if isinstance(each, Command) else each for each in callbacks]
    functions = (inspect.unwrap(value) for value in values if callable(value) and not inspect.isclass(value))
    return {value.__code__ for value in functions if inspect.isfunction(value)}


@pytest.mark.slow
def test_no_function_takes_more_than_seven_parameters() -> None:
    known = {(Path(code.co_filename), code.co_name, code.co_firstlineno) for code in public()}
    excessive = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for name, node in functions(ast.parse(path.read_text(encoding="utf-8"))):
            first = min([node.lineno, *(mark.lineno for mark in node.decorator_list)])
            if len(parameters(node)) <= MOST or is_operator(node) or (path, node.name, first) in known:
                continue
            excessive.append(f"{path.relative_to(PACKAGE).as_posix()} {name}")
    assert not excessive


def test_what_is_counted() -> None:
    method = "class A:\n    def f(self, a, /, b, *c, d=0, **e):\n        def g(): ...\n"
    text = f"{method}@torch.library.custom_op('x')\ndef h(a): ...\n"
    named = dict(functions(ast.parse(text)))
    assert [(name, parameters(node)) for name, node in named.items()] == [
        ("A.f", ["a", "b", "d", "c", "e"]),
        ("A.f.g", []),
        ("h", ["a"]),
    ]
    assert is_operator(named["h"]) and not is_operator(named["A.f"])
    names = {code.co_name for code in public()}
    assert {"compile", "tune", "plan", "param_groups", "export", "inspect", "factors"} <= names
