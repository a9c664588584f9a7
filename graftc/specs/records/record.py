"""The base class of records: frozen data whose JSON follows from the fields of a class. No pydantic, no torch."""

from __future__ import annotations

import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import cache
from pathlib import PurePath
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, get_args

if TYPE_CHECKING:
    stated = property
else:

    class stated(property):  # noqa: N801, it is used as property is
        """A property that is part of a record's JSON, after its fields."""


class ReadOnly(dict[Any, Any]):
    """A mapping in a record, which nothing changes; mappings in it are read-only as well."""

    def __init__(self, values: Mapping[Any, Any]) -> None:
        super().__init__({key: ReadOnly(each) if isinstance(each, dict) else each for key, each in values.items()})

    def __reduce__(self) -> tuple[Any, ...]:
        return ReadOnly, (dict(self),)

    def _refuse(self, *args: Any, **options: Any) -> NoReturn:
        raise TypeError("mappings in records are read-only; dict(...) makes a copy")

    __setitem__ = __delitem__ = __ior__ = update = setdefault = pop = popitem = clear = _refuse


class Record:
    """Base class of records: frozen dataclasses whose fields are documented by the strings below them.

    Type checkers check records that graftc creates. Records that it reads are validated
    (`graftc.records.reading.from_json`): types are strict, and fields that are unknown or follow from others are
    ignored.

    Args:
        published: the name of the class in published JSON Schemas; by default its own, with ``Data`` unless it is a
            result.
        behind: names of fields and stated properties that follow a field in JSON, by the name of that field; the empty
            name for those that come first. Other properties come last.
        unstated: names of fields that are not part of the JSON; they have defaults.
        optional: whether fields with defaults may be missing in JSON.
        closed: whether unknown fields are errors when JSON is read.
    """

    __pydantic_config__: ClassVar[Any] = {
        "extra": "ignore",
        "strict": True,
        "allow_inf_nan": False,
        "populate_by_name": True,
        "alias_generator": lambda name: name.rstrip("_"),
    }
    _behind: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    _unstated: ClassVar[frozenset[str]] = frozenset()
    _optional: ClassVar[bool] = False

    def __init_subclass__(
        cls,
        *,
        published: str = "",
        behind: Mapping[str, tuple[str, ...]] | None = None,
        unstated: Iterable[str] = (),
        optional: bool = False,
        closed: bool = False,
    ) -> None:
        super().__init_subclass__()
        extra = {"extra": "forbid"} if closed else {}
        title = cls.__name__ if cls.__name__.endswith("Result") else f"{cls.__name__}Data"
        cls.__pydantic_config__ = {**cls.__pydantic_config__, **extra, "title": published or title}
        cls._behind = {**cls._behind, **(behind or {})}
        cls._unstated = cls._unstated | {*unstated}
        cls._optional = optional

    def __post_init__(self) -> None:
        for name, value in tuple(vars(self).items()):
            if isinstance(value, dict):
                object.__setattr__(self, name, ReadOnly(value))

    def to_json(self) -> dict[str, Any]:
        """Return plain data, in the order of `stated_names`."""
        return {name.rstrip("_"): _plain(getattr(self, name)) for name in stated_names(type(self))}  # type: ignore[arg-type]


@cache
def stated_names(cls: type[Record]) -> tuple[str, ...]:
    """Return the names in a record's JSON: fields, and stated properties in their positions."""
    elsewhere = {*cls._unstated, *(name for names in cls._behind.values() for name in names)}
    own = [field.name for field in fields(cls) if field.name not in elsewhere]  # type: ignore[arg-type]
    placed = [each for name in ("", *own) for each in (name, *cls._behind.get(name, ()))]
    return tuple(dict.fromkeys([*placed[1:], *stated_properties(cls)]))


def stated_properties(cls: type[Record]) -> dict[str, property]:
    """Return the stated properties of a class and its bases, by name."""
    spaces = (vars(base) for base in reversed(cls.__mro__))
    members = {name: member for space in spaces for name, member in space.items()}
    return {name: getattr(m, "wrapped", m) for name, m in members.items() if _is_stated(m)}


def _is_stated(member: object) -> bool:
    return isinstance(getattr(member, "wrapped", member), stated)


def _plain(value: Any) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, Mapping):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, frozenset):
        return sorted(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, PurePath):
        return str(value)
    return value if value is None or isinstance(value, str | int | float) else value.name


@dataclass(frozen=True)
class OrNull:
    """A value of a record that is null in JSON in some cases, as in ``Annotated[float, OrNull()]``."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of the value or null."""
        return {"type": "nullable", "schema": handler(source)}


@dataclass(frozen=True)
class Listed:
    """A set that is a sorted list in JSON, as in ``Annotated[frozenset[str], Listed()]``."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of the list."""
        return handler(types.GenericAlias(tuple, (get_args(source)[0], ...)))


@dataclass(frozen=True)
class Named:
    """An object that JSON identifies by its name, as in ``Annotated[fx.Node, Named()]``."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of the name."""
        return handler(str)


@dataclass(frozen=True)
class Pattern:
    """A regular expression that a string in a record matches, as in ``Annotated[str, Pattern("a+")]``."""

    pattern: str

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:
        """Return pydantic's schema of the string."""
        return {**handler(source), "pattern": self.pattern}
