"""Outputs that a lowered graph does not give any more."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass, replace
from functools import cache
from typing import Any, NoReturn, cast

from graftc.passes.core.ir.program import OutputSpec
from graftc.specs.errors.diagnostics import GraftError


class AbsentOutputError(GraftError, AttributeError):
    """An output that a training graph does not give: GC150. `hasattr` says that there is none."""


def refuse(name: str) -> NoReturn:
    """Whoever asks for an output is told why there is none."""
    raise AbsentOutputError(
        "GC150",
        f"{name} are not there while training: head and loss are computed a few rows at a time (memory: loss)",
        hint="put memory: {loss: whole} into the spec, or call the model in eval mode",
    )


def without(spec: OutputSpec, leaves: Collection[int]) -> OutputSpec:
    """How outputs are put together where some of the flat ones are gone.

    Fields of a ``ModelOutput`` are None inside and refused to whoever asks for them (GC150), and so are keys of a
    mapping; places in a tuple or list hold None.

    Args:
        spec: how they were.
        leaves: the numbers of those that are gone.
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
    """A class of outputs some of whose fields are refused."""

    def absent(name: str) -> property:
        def read(self: Any) -> Any:
            return self[name] if name in self.keys() else refuse(name)

        # What sets a field to a value has put it among the keys already.
        return property(read, lambda self, value: None)

    def item(self: Any, key: Any) -> Any:
        if key in gone and key not in self.keys():
            refuse(key)
        return cls.__getitem__(self, key)

    def reduced(self: Any) -> Any:
        """Copies and pickles are of the plain class, with None for what is gone."""
        return cls, tuple(
            None if f.name in gone and f.name not in self.keys() else getattr(self, f.name) for f in fields(self)
        )

    body = {name: absent(name) for name in gone}
    made = {"__getitem__": item, "__reduce__": reduced, "__module__": cls.__module__, "__doc__": cls.__doc__}
    return type(cls.__name__, (cls,), {**body, **made})
