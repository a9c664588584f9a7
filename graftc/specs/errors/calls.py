"""Coded errors for calls that do not match the signature of a public function; they name the missing arguments."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache, wraps
from inspect import Parameter
from typing import Any, TypeVar, cast

from graftc.specs.errors.diagnostics import GraftError, correction
from graftc.specs.errors.text import counted, listed

F = TypeVar("F", bound=Callable[..., Any])
_BY_POSITION = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)


def public(name: str) -> Callable[[F], F]:
    """Return a decorator that raises GC073 for a call with a missing or unexpected argument.

    Args:
        name: the name by which users call the function, such as ``graftc.compile`` or ``compiled.trainer``.
    """

    def decorate(function: F) -> F:
        @cache
        def signature() -> inspect.Signature:
            return inspect.signature(function)

        @wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                signature().bind(*args, **kwargs)
            except TypeError:
                raise _misfit(name, list(signature().parameters.values()), args, kwargs) from None
            return function(*args, **kwargs)

        return cast("F", call)

    return decorate


def _misfit(name: str, parameters: list[Parameter], args: Sequence[Any], kwargs: Mapping[str, Any]) -> GraftError:
    if parameters and parameters[0].name == "self":
        parameters, args = parameters[1:], args[1:]
    ordered = [p.name for p in parameters if p.kind in _BY_POSITION]
    by_name = [p.name for p in parameters if p.kind is Parameter.KEYWORD_ONLY]
    required = [p.name for p in parameters if p.default is Parameter.empty and p.name in (*ordered, *by_name)]
    usage = f"call {name}({', '.join(word if word in ordered else f'{word}=...' for word in required)})"
    placed = ordered[: len(args)]
    open_ended = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    if unknown := [word for word in kwargs if word not in (*ordered, *by_name) and not open_ended]:
        hint, _ = correction(unknown[0], [*ordered, *by_name], f"its arguments are {', '.join((*ordered, *by_name))}")
        return GraftError("GC073", f"{name} has no argument {unknown[0]!r}", hint=hint)
    if len(args) > len(ordered):
        most = f"takes {counted(len(ordered), 'positional argument')}, but {len(args)} were passed"
        hint = f"pass {', '.join(by_name)} by name" if by_name else usage
        return GraftError("GC073", f"{name} {most}", hint=hint)
    if twice := [word for word in placed if word in kwargs]:
        return GraftError("GC073", f"{name} got {twice[0]!r} twice, by position and by name", hint=usage)
    lacking = [word for word in required if word not in placed and word not in kwargs]
    return GraftError("GC073", f"{name} needs {listed(lacking)}", hint=usage)
