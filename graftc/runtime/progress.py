"""Progress of operations on compiled and merged models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

from graftc.passes.core import progress
from graftc.runtime.model.model_runner import ModelRunner

P = ParamSpec("P")
R = TypeVar("R")


def working(doing: str, runner: ModelRunner) -> AbstractContextManager[None]:
    """Show progress of an operation on a model while the block runs, if the operation takes long.

    Args:
        doing: the activity, such as ``merging``.
        runner: the Runner of the model.
    """
    return progress.working(doing, type(runner.compilation.source).__name__)


def during(doing: str) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """Return a decorator that runs a method in `working`; the method's object must have a Runner (``self.runner``)."""

    def around(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @wraps(method)
        def shown(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            with working(doing, self.runner):
                return method(self, *args, **kwargs)

        return shown  # type: ignore[return-value]

    return around
