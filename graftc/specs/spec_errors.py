"""Convert pydantic's errors to coded errors with a path, a hint and, if one can be guessed, a correction."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn, TypeAlias, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError

from graftc.specs.errors.diagnostics import CATALOGUE, GraftError, Place, correction
from graftc.specs.errors.text import quoted, reason_in, shown
from graftc.specs.source import format_path

Problem: TypeAlias = tuple[tuple[str | int, ...], GraftError]
"""An error, and its path relative to the value that is validated."""

_MISSING = object()
_SHOWN = 10
"""Maximum number of errors that are reported besides the first one."""
_BOUNDS = {
    "greater_than": ("gt", "greater than"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "less than"),
    "less_than_equal": ("le", "at most"),
}
_TYPES = {
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "a string",
    "none_required": "null",
    "list_type": "a list",
    "tuple_type": "a list",
    "is_instance_of": "a list",
    "sequence_str": "a list",
    "dict_type": "a mapping",
    "mapping_type": "a mapping",
    "model_type": "a mapping",
}


def reject(problems: Iterable[Problem]) -> None:
    """Fail a validator with coded errors, if there are any.

    Raises:
        ValidationError: if there are; pydantic keeps the paths, and :func:`explain` converts it back.
    """
    lines: list[InitErrorDetails] = []
    for path, error in problems:
        context: dict[str, Any] = {"text": error.message, "hint": error.hint, "fix": error.fix}
        kind = PydanticCustomError(error.code, "{text}", context)
        lines.append(InitErrorDetails(type=kind, loc=path, input=None))
    if lines:
        raise ValidationError.from_exception_data("spec", lines)


def refuse(
    path: str | int | tuple[str | int, ...],
    error: GraftError | str,
    *,
    hint: str | None = None,
    fix: tuple[str, str] | None = None,
    code: str = "GC002",
) -> NoReturn:
    """Fail a validator with one error.

    Args:
        path: a field or an index of the value that is validated, or a longer path; ``()`` for the value itself.
        error: the error, or its message.
        hint, fix, code: as for `GraftError`, if ``error`` is only a message; the default code is GC002.

    Raises:
        ValidationError: always, as in `reject`.
    """
    coded = error if isinstance(error, GraftError) else GraftError(code, error, hint=hint, fix=fix)
    reject([(path if isinstance(path, tuple) else (path,), coded)])
    raise AssertionError("reject has raised")


def problems_of(items: Iterable[Any], check: Callable[[Any], object]) -> list[Problem]:
    """Return the errors that a check raises for some items, each at the index of its item."""
    problems: list[Problem] = []
    for index, item in enumerate(items):
        try:
            check(item)
        except GraftError as error:
            problems.append(((index,), error))
    return problems


def first_repeat(values: Sequence[Any]) -> int | None:
    """Return the index of the first value that is equal to an earlier one; None if all differ."""
    first = {value: index for index, value in reversed([*enumerate(values)])}
    return next((index for index, value in enumerate(values) if first[value] != index), None)


def explain(error: ValidationError, root: type[BaseModel], data: object) -> GraftError:
    """Return the first error, with the others as its details. Places contain paths; a Source adds lines.

    Args:
        error: the error that pydantic raised.
        root: the model class that was validated.
        data: the data that was validated.
    """
    problems: dict[tuple[str | int, ...], list[ErrorDetails]] = {}
    for item in error.errors(include_url=False):
        problems.setdefault(_real_path(data, item), []).append(item)
    # A failed union reports each branch; errors deeper in it explain more than "is not a string" above them.
    around = {path[:length] for path in problems for length in range(len(path))}
    paths = [p for p in problems if not (p in around and all(item["type"] in _TYPES for item in problems[p]))]
    first, *others = [_one(path, problems[path], root, data) for path in paths[: _SHOWN + 1]]
    if not others:
        return first
    more = [f"and {len(paths) - len(others) - 1:,} more"] if len(paths) > _SHOWN + 1 else []
    details: list[str | GraftError] = [*others, *more]
    return first.changed(details=details)


def _child(value: object, step: str | int) -> object:
    if isinstance(value, Mapping):
        return value.get(step, _MISSING)
    if isinstance(value, BaseModel) and isinstance(step, str):
        return getattr(value, step, _MISSING)
    if isinstance(step, int) and isinstance(value, Sequence) and not isinstance(value, str):
        return value[step] if 0 <= step < len(value) else _MISSING
    return _MISSING


def _real_path(data: object, item: ErrorDetails) -> tuple[str | int, ...]:
    """Return the error's location without the names of union branches, which are not places in the document."""
    path: list[str | int] = []
    value = data
    loc = item["loc"]
    for position, step in enumerate(loc):
        child = _child(value, step)
        if child is not _MISSING:
            path.append(step)
            value = child
        elif item["type"] == "missing" and position == len(loc) - 1:
            path.append(step)
    return tuple(path)


def _one(path: tuple[str | int, ...], items: list[ErrorDetails], root: type[BaseModel], data: object) -> GraftError:
    item = items[0]
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    place = Place(path=format_path(path))
    name = format_path(path[-2:] if path and isinstance(path[-1], int) else path[-1:]) or "the spec"
    if kind in CATALOGUE:
        return GraftError(kind, context["text"], place=place, hint=context.get("hint"), fix=context.get("fix"))
    if kind == "extra_forbidden":
        return _unknown_field(str(path[-1]), place, _fields_at(root, data, path[:-1]))
    if kind == "json_invalid":
        return GraftError("GC001", f"not valid JSON: {context['error']}", place=place)
    if kind == "missing":
        hints: Mapping[str, str] = getattr(root, "MISSING", {})
        return GraftError("GC002", f"{name} is missing", place=place, hint=hints.get(str(path[-1])))
    if kind in _BOUNDS:
        key, words = _BOUNDS[kind]
        limit = context[key]
        bound = int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        return GraftError("GC002", f"{name} must be {words} {bound}, not {shown(value)}", place=place)
    if kind == "literal_error":
        return _not_listed(name, path, value, items, place)
    if all(i["type"] in _TYPES for i in items):
        wanted = list(dict.fromkeys(_TYPES[i["type"]] for i in items))
        return GraftError("GC002", f"{name} must be {' or '.join(wanted)}, not {_describe(value)}", place=place)
    return GraftError("GC002", f"{name}: {reason_in(item['msg'])}", place=place)


def _unknown_field(word: str, place: Place, fields: list[str]) -> GraftError:
    hint, fix = correction(word, fields, f"the fields here are: {', '.join(fields)}")
    return GraftError("GC003", f"field {quoted(word)} is unknown", place=place, hint=hint, fix=fix)


def _not_listed(
    name: str, path: tuple[str | int, ...], value: object, items: list[ErrorDetails], place: Place
) -> GraftError:
    if path == ("version",):
        hint = "this release reads version 1"
        return GraftError("GC007", f"spec version {shown(value)} is not supported", place=place, hint=hint)
    expected = " or ".join(str(i["ctx"]["expected"]) for i in items if i["type"] == "literal_error")
    choices = [word.strip("'") for word in expected.replace(" or ", ", ").split(", ")]
    hint, fix = correction(value, choices)
    return GraftError("GC002", f"{name} must be {expected}, not {shown(value)}", place=place, hint=hint, fix=fix)


def _describe(value: object) -> str:
    if isinstance(value, Mapping):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return "a list"
    return shown(value)


def _fields_at(root: type[BaseModel], data: object, path: Sequence[str | int]) -> list[str]:
    """Return the names of the fields of the model at ``path``."""
    models: list[type[BaseModel]] = [root]
    value = data
    for step in path:
        value = _child(value, step)
        if isinstance(step, str):
            fields = (model.model_fields.get(step) for model in models)
            models = [m for field in fields if field is not None for m in _models_in(field.annotation)]
        models = [_concrete(model, value) for model in models]
    return list(dict.fromkeys(name for model in models for name in model.model_fields))


CONCRETE: dict[type[BaseModel], Callable[[Mapping[Any, Any]], type[BaseModel]]] = {}
"""For each base class whose subclass depends on the content of a mapping: the function that determines the subclass."""


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for arg in get_args(annotation) for model in _models_in(arg)]


def _concrete(model: type[BaseModel], data: object) -> type[BaseModel]:
    """Return the class of the data if the annotation only restricts it to one of several."""
    return CONCRETE[model](data) if model in CONCRETE and isinstance(data, Mapping) else model
