"""Describe the value checks made while a model is traced, and refuse those on which no graph may depend."""

from __future__ import annotations

import inspect
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from graftc.compat.checks import check, told_of_value_checks
from graftc.compiler.capture.refusals import UntraceableError, of_the_model


@contextmanager
def noted(asserted: list[str]) -> Iterator[None]:
    """Append a description of every value check that the block makes to ``asserted``."""
    with told_of_value_checks(lambda message: asserted.append(_about(message))):
        yield


def _about(message: Any) -> str:
    """Return a description of the current check: its message without values, and its file and line.

    transformers passes the message to the helper that makes the check.
    """
    for frame, line in traceback.walk_stack(inspect.currentframe()):
        code = frame.f_code
        if code.co_name == "torch_compilable_check":
            message = message or frame.f_locals.get("msg")
        elif of_the_model(code.co_filename):
            place, told = f"{Path(code.co_filename).name}:{line}", _without_values(message)
            return f"{told} ({place})" if told else place
    return _without_values(message)


def _without_values(message: Any) -> str:
    try:
        text = message() if callable(message) else message
    except Exception:  # the message contains values, which a trace does not have
        return ""
    return re.split(r"[,:;]|\.\s", text)[0].strip() if isinstance(text, str) else ""


def hold_for_all_values(condition: Any, message: Any = "", error: Any = None) -> None:
    """Check the condition for a transformers patch, which computes something other than the model's own code does.

    Raises:
        UntraceableError: if the condition depends on values and the model is being exported: the graph would also be
            used where the condition does not hold, for example on images of different sizes.
    """
    if isinstance(condition, torch.Tensor):
        if not torch.compiler.is_exporting():
            return
        raise UntraceableError(RuntimeError(f"a graph would not hold for all inputs: {message}"))
    check(condition)
