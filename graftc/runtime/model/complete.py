"""What calls leave out, files do not: one rule for all that is made of a compiled model."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def with_every_adaptation(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """A method of a Runner that has every adaptation, whatever `disable` and `disabled` leave out of calls meanwhile.

    Whatever writes a file or makes another model is such a method. Calls in other threads go on as they were.
    """

    @functools.wraps(method)
    def called(self: Any, *args: P.args, **kwargs: P.kwargs) -> R:
        return method(self.complete(), *args, **kwargs)

    return called  # type: ignore[return-value]
