"""Models that a callable of the user's returns: ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any, NoReturn

import torch
from torch import nn

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.quiet import quiet_quantisers
from graftc.specs.errors.diagnostics import GraftError, first_line, nearest

__all__ = ["from_callable"]


def from_callable(text: str, meta: bool = False) -> tuple[nn.Module, ExampleInputs | None]:
    """What the callable of a MODEL argument returns: a module, and example inputs where it gives some.

    Args:
        text: ``package.module:callable``.
        meta: call it on the meta device.

    Raises:
        GraftError: GC032 where there is no such callable, it fails, or it returns something else.
    """
    with quiet_quantisers():
        return _made(text, meta)


def _made(text: str, meta: bool) -> tuple[nn.Module, ExampleInputs | None]:
    path, _, name = text.partition(":")
    make = _attribute(_module(path), path, name)
    if not callable(make):
        _fail(f"{text} is not callable but {type(make).__name__}", "name a function that returns the model")
    try:
        with torch.device("meta") if meta else nullcontext():
            made = make()
    except (Exception, SystemExit) as error:
        if isinstance(error, GraftError):
            raise
        _fail(f"{text} failed: {_reason(error)}", cause=error, details=_where(error))
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        given = type(made).__name__
        _fail(f"{text} returned {given}, not an nn.Module", "return the model itself, or (model, example_inputs)")
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if inputs is not None and not isinstance(inputs, Mapping | tuple | list):
        given = type(inputs).__name__
        _fail(f"{text} returned example inputs that are a {given}", "return tensors by name, or in order")
    return (model.to("meta") if meta else model), inputs


def _module(path: str) -> Any:
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if path == missing or path.startswith(f"{missing}."):
            _fail(
                f"there is no module {missing!r}", _sibling(missing) or f"searched {here!r} and the installed packages"
            )
        _fail(f"{path} cannot be imported: {_reason(error)}", cause=error, details=_where(error))
    except (Exception, SystemExit) as error:
        _fail(f"{path} cannot be imported: {_reason(error)}", cause=error, details=_where(error))


def _sibling(missing: str) -> str | None:
    """The nearest module beside the one that is missing."""
    import pkgutil

    parent, _, last = missing.rpartition(".")
    found = find_spec(parent) if parent else None
    places = list(found.submodule_search_locations or ()) if found is not None else [os.getcwd()]
    close = nearest(last, [info.name for info in pkgutil.iter_modules(places)], n=1)
    return f"did you mean {'.'.join([parent, close[0]] if parent else close)!r}?" if close else None


def _attribute(module: Any, path: str, name: str) -> Callable[[], Any]:
    found = module
    for part in name.split("."):
        if not hasattr(found, part):
            close = nearest(part, [n for n in dir(found) if callable(getattr(found, n, None))], n=1)
            _fail(f"{path} has no {name!r}", f"did you mean '{path}:{close[0]}'?" if close else None)
        found = getattr(found, part)
    return found  # type: ignore[no-any-return]


def _where(error: BaseException) -> tuple[str, ...]:
    """The line of the user's code that failed."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[:1] != "<"]
    return (f"at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}",) if frames else ()


def _fail(message: str, hint: str | None = None, *, cause: BaseException | None = None, details: Any = ()) -> NoReturn:
    raise GraftError("GC032", message, hint=hint, details=details) from cause


def _reason(error: BaseException) -> str:
    return first_line(error).rstrip(".")
