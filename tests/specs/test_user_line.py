"""Warnings point at the line of user code that led to them, however deep in the package they are raised."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForTokenClassification

import graftc
from graftc.specs.errors.diagnostics import GraftWarning, warn
from graftc.testing.families import tiny

PACKAGE = Path(graftc.__file__).parent
LORA = {"adapt": [{"method": "lora", "target": {"role": ["attn.q"]}}]}


def line_of(function: Callable[..., Any]) -> int:
    """Return the line of this file that a function's only warning points at."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        function()
    (place,) = {(w.filename, w.lineno) for w in caught if isinstance(w.message, GraftWarning)}
    assert place[0] == __file__
    return place[1]


def line_with(function: Callable[..., Any], text: str) -> int:
    lines, start = inspect.getsourcelines(function)
    (number,) = (number for number, line in enumerate(lines, start) if text in line)
    return number


PLACES = {
    "torch": Path(torch.__file__).parent / "example.py",
    "library": Path(inspect.__file__),
    "graph": Path("<eval_with_key>.3"),
}


@pytest.mark.parametrize("depth", [0, 1, 7])
@pytest.mark.parametrize("place", PLACES)
def test_frames_of_packages_are_skipped(place: str, depth: int) -> None:
    between = compiled_at(PLACES[place])

    def called() -> None:
        between(depth)  # the user's

    assert line_of(called) == line_with(called, "# the user's")


def compiled_at(file: Path) -> Callable[[int], None]:
    """Compile a function that calls the package, as if it were in another file."""
    source = "def between(depth):\n    warns(depth)\n"
    package = "def warns(depth):\n    warns(depth - 1) if depth else warn('GC024', 'tied')\n"
    ours: dict[str, Any] = {"warn": warn, "__name__": "graftc.runtime.example"}
    exec(compile(package, str(PACKAGE / "runtime" / "example.py"), "exec"), ours)
    names: dict[str, Any] = {"warns": ours["warns"]}
    exec(compile(source, str(file), "exec"), names)
    function: Callable[[int], None] = names["between"]
    return function


@pytest.mark.slow
def test_a_step_that_torch_calls() -> None:
    compiled = graftc.compile(LORA, tiny("llama"))
    ids = torch.ones(1, 4, dtype=torch.long)

    def step() -> None:
        compiled(input_ids=ids, position_ids=torch.tensor([[0, 1, 0, 1]]), attention_mask=ids)  # the user's

    assert line_of(step) == line_with(step, "# the user's")


@pytest.mark.slow
@pytest.mark.parametrize("function", ["compile", "check"])
def test_the_task_of_a_config(function: str) -> None:
    model = BertForTokenClassification(tiny("bert").config)
    config = {"peft_type": "LORA", "task_type": "TOKEN_CLS", "target_modules": ["query"]}
    call = getattr(graftc, function)

    def user() -> None:
        call(config, model)  # the user's

    assert line_of(user) == line_with(user, "# the user's")


def test_nothing_else_in_the_package_warns() -> None:
    """Only one module of the package calls `warnings`."""
    calls = []
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        if "stacklevel" not in text and "warnings" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and node.attr in ("warn", "warn_explicit"):
                calls.append(path.relative_to(PACKAGE).as_posix())
            if isinstance(node, ast.keyword) and node.arg == "stacklevel":
                calls.append(path.relative_to(PACKAGE).as_posix())
    assert calls == ["specs/errors/user_line.py"]
