"""Detect what a forward pass changes in modules: attributes, contents of containers, tensors written in place.

A graph has no attributes: such changes do not happen when it runs, and the values that were read are constants in it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

from torch import Tensor, nn

from graftc.compat.hooks import forward_hooks
from graftc.compat.modules import CHILDREN, PARAMETERS
from graftc.compat.tensors import version_of

_LIBRARIES = ("torch.", "transformers.", "graftc.")
_TORCHS_OWN = frozenset(vars(nn.Module()))
_TABLES = (PARAMETERS, CHILDREN)
_MISSING = object()


class Attributes:
    """A snapshot of a module's attributes, and of the contents of those that are containers or plain objects.

    Args:
        module: the module to record.
    """

    def __init__(self, module: nn.Module) -> None:
        self._now = vars(module)
        self._values = {name: value for name, value in self._now.items() if name not in _TORCHS_OWN}
        self._contents = {
            name: contents for name, value in self._values.items() if (contents := _Contents.of(value)) is not None
        }
        self._versions = {name: version_of(value) for name, value in self._values.items() if isinstance(value, Tensor)}
        self._tables = {name: dict(self._now[name]) for name in _TABLES}

    def changed(self) -> list[str]:
        """Return the names of attributes that were replaced, have changed contents, or are tensors written in place."""
        now = {name: value for name, value in self._now.items() if name not in _TORCHS_OWN}
        names = [name for name in {**self._values, **now} if not self._same(name, now)]
        names += [name for name, count in self._versions.items() if version_of(self._values[name]) != count]
        for table, before in self._tables.items():
            own = self._now[table]
            names += [n for n in {**before, **own} if own.get(n, _MISSING) is not before.get(n, _MISSING)]
        return list(dict.fromkeys(names))

    def _same(self, name: str, now: Mapping[str, Any]) -> bool:
        value = now.get(name, _MISSING)
        contents = self._contents.get(name)
        return contents.same(value) if contents is not None else value is self._values.get(name, _MISSING)

    def restore(self) -> None:
        """Restore the contents of containers and plain objects; the caller restores the attributes themselves."""
        for contents in self._contents.values():
            if not contents.same(contents.value):
                contents.restore()


class _Contents:
    """The contents of a container, or the attributes of a plain object, to a depth of two."""

    def __init__(self, value: Any, depth: int) -> None:
        self.value = value
        self.items = _items(value)
        inner = {key: _Contents.of(item, depth - 1) for key, item in self.items.items()} if depth else {}
        self.inner = {key: contents for key, contents in inner.items() if contents is not None}

    @classmethod
    def of(cls, value: Any, depth: int = 1) -> _Contents | None:
        """Return the contents of a value; None if it is neither a container nor a plain object."""
        return cls(value, depth) if _is_container(value) or _is_plain(value) else None

    def same(self, other: Any) -> bool:
        """Return whether a value is the recorded one, or a container of the same type, with unchanged contents.

        The tracer replaces containers with copies.
        """
        if other is not self.value and not (_is_container(other) and type(other) is type(self.value)):
            return False
        now = _items(other)
        if list(now) != list(self.items):
            return False
        return all(
            self.inner[key].same(now[key]) if key in self.inner else _copied(now[key], item)
            for key, item in self.items.items()
        )

    def restore(self) -> None:
        """Restore the recorded contents."""
        target = self.value if _is_container(self.value) else vars(self.value)
        items = self.items if isinstance(target, dict) else self.items.values()
        if not isinstance(target, tuple):
            target.clear()
            (target.update if isinstance(target, dict | set) else target.extend)(items)
        for contents in self.inner.values():
            contents.restore()


def _is_container(value: Any) -> bool:
    return isinstance(value, list | tuple | dict | set | deque)


def _copied(value: Any, before: Any) -> bool:
    """Return whether a value is the previous one or may be a copy of it; its contents are not compared."""
    if value is before:
        return True
    return _is_container(value) and type(value) is type(before) and len(value) == len(before)


def _is_plain(value: Any) -> bool:
    """Return whether a value is an instance of a user's class, whose attributes a forward pass may use as counters."""
    if isinstance(value, nn.Module | Tensor | type | FunctionType | MethodType) or not hasattr(value, "__dict__"):
        return False
    return not (type(value).__module__ + ".").startswith(_LIBRARIES)


def _items(value: Any) -> dict[Any, Any]:
    """Return the items of a dict, those of any other container by index, or the attributes of an object by name."""
    if isinstance(value, dict):
        return dict(value)
    return dict(enumerate(value)) if _is_container(value) else dict(vars(value))


def has_same_items(now: Mapping[Any, Any], before: Mapping[Any, Any]) -> bool:
    """Return whether a mapping has the same keys as before, each with the same object."""
    return now.keys() == before.keys() and all(now[key] is value for key, value in before.items())


@contextmanager
def noticed(model: nn.Module) -> Iterator[list[str]]:
    """Yield a list to which the attributes assigned during the block are added after it, as ``path.attribute``.

    Between calls, torch and transformers layers store only such things as tables that grow with a text, so these layers
    are checked only if the user wrote their ``forward`` or one of their hooks.
    """
    before = [(path, Attributes(module)) for path, module in model.named_modules() if is_the_users(module)]
    names: list[str] = []
    yield names
    for path, attributes in before:
        names += [f"{path}.{name}".lstrip(".") for name in attributes.changed()]


def is_the_users(module: nn.Module) -> bool:
    """Return whether the user wrote a module's class, its forward or one of its hooks."""
    code: list[Any] = [
        type(module),
        *forward_hooks(module).values(),
        *([vars(module)["forward"]] if "forward" in vars(module) else []),
    ]
    return any(not (_home(item) + ".").startswith(_LIBRARIES) for item in code)


def _home(code: Any) -> str:
    return getattr(code, "__module__", None) or type(code).__module__
