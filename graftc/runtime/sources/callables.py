"""Load models from a user's callable: ``package.module:callable``."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from graftc.compiler.capture.interface import ExampleInputs
from graftc.compiler.quiet import quiet_quantisers
from graftc.runtime.sources.refusals import reason_of, refuse
from graftc.specs.errors.diagnostics import GraftError, nearest


@quiet_quantisers()
def from_callable(text: str, meta: bool = False) -> tuple[nn.Module, ExampleInputs | None]:
    """Call the callable that a MODEL argument names, and return its module, and its example inputs or None.

    Args:
        text: ``package.module:callable``.
        meta: whether to call it on the meta device.

    Raises:
        GraftError: GC032 if there is no such callable, if it fails, or if it returns something else.
    """
    path, _, name = text.partition(":")
    make = _attribute(_module(path), path, name)
    if not callable(make):
        refuse(f"{text} is not callable but of type {type(make).__name__}", "name a function that returns the model")
    try:
        with torch.device("meta") if meta else nullcontext():
            result = make()
    except (Exception, SystemExit) as error:
        if isinstance(error, GraftError):
            raise
        refuse(f"{text} failed: {reason_of(error)}", cause=error, details=_where(error))
    model, inputs = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    if not isinstance(model, nn.Module):
        given = type(result).__name__
        refuse(f"{text} returned {given}, not an nn.Module", "return the model itself, or (model, example_inputs)")
    if isinstance(inputs, torch.Tensor):
        inputs = (inputs,)
    if inputs is not None and not isinstance(inputs, Mapping | tuple | list):
        given = type(inputs).__name__
        refuse(f"{text} returned example inputs of type {given}", "return tensors by name, or in order")
    return (model.to("meta") if meta else model), inputs


def _module(path: str) -> Any:
    cwd = os.getcwd()
    if cwd not in sys.path and "" not in sys.path:
        sys.path.insert(0, cwd)
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        missing = error.name or ""
        if path == missing or path.startswith(f"{missing}."):
            refuse(
                f"there is no module {missing!r}", _sibling(missing) or f"searched {cwd!r} and the installed packages"
            )
        refuse(f"{path} cannot be imported: {reason_of(error)}", cause=error, details=_where(error))
    except (Exception, SystemExit) as error:
        refuse(f"{path} cannot be imported: {reason_of(error)}", cause=error, details=_where(error))


def _sibling(missing: str) -> str | None:
    """Return a hint that suggests the module with the nearest name to a missing one; None if none is near."""
    import pkgutil

    parent, _, last = missing.rpartition(".")
    spec = find_spec(parent) if parent else None
    places = list(spec.submodule_search_locations or ()) if spec is not None else [os.getcwd()]
    close = nearest(last, [info.name for info in pkgutil.iter_modules(places)], n=1)
    return f"did you mean {'.'.join([parent, close[0]] if parent else close)!r}?" if close else None


def _attribute(module: Any, path: str, name: str) -> Callable[[], Any]:
    value = module
    for part in name.split("."):
        if not hasattr(value, part):
            close = nearest(part, [n for n in dir(value) if callable(getattr(value, n, None))], n=1)
            refuse(f"{path} has no {name!r}", f"did you mean '{path}:{close[0]}'?" if close else None)
        value = getattr(value, part)
    return value  # type: ignore[no-any-return]


def _where(error: BaseException) -> tuple[str, ...]:
    """Return the line of the user's code that failed, as an error's details; empty if there is none."""
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename != __file__ and f.filename[:1] != "<"]
    return (f"at {frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}",) if frames else ()
