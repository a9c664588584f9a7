"""Progress of what is done with a compiled model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

from graftc.passes.core import progress
from graftc.runtime.model.runner import runner_of

Function = TypeVar("Function", bound=Callable[..., Any])


def during(doing: str) -> Callable[[Function], Function]:
    """A function of a compiled model shows that it runs, where it takes long.

    Args:
        doing: what it does, as ``merging``.
    """

    def around(function: Function) -> Function:
        @wraps(function)
        def shown(compiled: Any, *args: Any, **kwargs: Any) -> Any:
            with progress.working(doing, type(runner_of(compiled)._compilation.source).__name__):
                return function(compiled, *args, **kwargs)

        return cast(Function, shown)

    return around
