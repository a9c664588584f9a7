"""A griffe extension: methods that a class publishes from another one are documented as its own."""

from __future__ import annotations

from typing import Any

import griffe

__all__ = ["PublishedMethods"]


class PublishedMethods(griffe.Extension):
    """Replace ``name = Published(Other.name)`` in a class by an alias of the method."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Replace the attributes of one class."""
        for name, member in list(cls.members.items()):
            value = getattr(member, "value", None) if isinstance(member, griffe.Attribute) else None
            if isinstance(value, griffe.ExprCall) and str(value.function) == "Published":
                (method,) = value.arguments
                assert isinstance(method, griffe.Expr)
                cls.set_member(name, griffe.Alias(name, method.canonical_path, parent=cls))
