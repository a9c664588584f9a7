"""Remove outputs that a lowered graph no longer returns, and explain their absence."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, NoReturn, cast

from graftc.passes.core.ir.program import OutputSpec
from graftc.specs.errors.diagnostics import GraftError


class AbsentOutputError(GraftError, AttributeError):
    """Raised for an output that a training graph does not return (GC150). `hasattr` returns false for it."""


def refuse(name: str) -> NoReturn:
    """Raise the error that explains why an output does not exist."""
    raise AbsentOutputError(
        "GC150",
        f"{name} are not returned in training: head and loss are computed a few rows at a time (memory: loss)",
        hint="set memory: {loss: whole} in the spec, or call the model in eval mode",
    )


def without(spec: OutputSpec, leaves: Collection[int]) -> OutputSpec:
    """Return the structure of the outputs after some of the flat outputs have been removed.

    Removed fields of a ``ModelOutput`` are None internally and raise GC150 when they are read, as do keys of a mapping;
    positions in a tuple or list contain None.

    Args:
        spec: the structure of all outputs.
        leaves: the indices of the flat outputs to remove.
    """
    return _without(spec, leaves, iter(range(len(spec.names))))


def _without(spec: OutputSpec, leaves: Collection[int], numbers: Iterator[int]) -> OutputSpec:
    if spec.kind == "leaf":
        return OutputSpec("none") if next(numbers) in leaves else spec
    children = tuple(_without(child, leaves, numbers) for child in spec.children)
    pairs = zip(spec.fields, spec.children, children, strict=False)
    gone = tuple(name for name, before, after in pairs if before.kind == "leaf" and after.kind == "none")
    cls = spec.cls
    if gone and cls is not None and issubclass(cls, dict) and is_dataclass(cast(Any, cls)):
        cls = _lacking(cls, gone)
    return replace(spec, children=children, cls=cls)


@cache
def _lacking(cls: type[Any], gone: tuple[str, ...]) -> type[Any]:
    """Return a subclass of an output class that refuses access to some of its fields."""

    def absent(name: str) -> property:
        def read(self: Any) -> Any:
            return self[name] if name in self.keys() else refuse(name)

        # Code that sets a field to a value has already added it to the keys.
        return property(read, lambda self, value: None)

    def item(self: Any, key: Any) -> Any:
        if key in gone and key not in self.keys():
            refuse(key)
        return cls.__getitem__(self, key)

    def reduced(self: Any) -> Any:
        """Return the arguments for copying and pickling: the plain class, with None for removed fields."""
        return cls, tuple(
            None if f.name in gone and f.name not in self.keys() else getattr(self, f.name) for f in fields(self)
        )

    body = {name: absent(name) for name in gone}
    overrides = {"__getitem__": item, "__reduce__": reduced, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**body, **overrides})
