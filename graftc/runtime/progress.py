"""Progress of what is done with a compiled or merged model."""

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
    """Inside, it shows that something is done with a model, where that takes long.

    Args:
        doing: what is done, as ``merging``.
        runner: of the model.
    """
    return progress.working(doing, type(runner.compilation.source).__name__)


def during(doing: str) -> Callable[[Callable[Concatenate[Any, P], R]], Callable[Concatenate[Any, P], R]]:
    """A method of what has a Runner, ``self.runner``, shows that it runs, where it takes long: see `working`."""

    def around(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
        @wraps(method)
        def shown(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
            with working(doing, self.runner):
                return method(self, *args, **kwargs)

        return shown  # type: ignore[return-value]

    return around
