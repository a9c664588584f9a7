"""Tables of the fields of a spec model, generated from its JSON Schema."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, get_args

from pydantic import BaseModel

from tools.docs.markdown import code, prose, table

__all__ = ["field_table", "nested_models"]

_BOUNDS = (
    ("minimum", ">="),
    ("exclusiveMinimum", ">"),
    ("maximum", "<="),
    ("exclusiveMaximum", "<"),
    ("minLength", "length >="),
    ("maxLength", "length <="),
    ("minItems", "at least"),
    ("maxItems", "at most"),
)
_WORDS = {
    "integer": "integer",
    "number": "number",
    "string": "text",
    "boolean": "`true` or `false`",
    "object": "mapping",
}

Link = Callable[[str], str | None]
"""A function from the name of a model to the address of its section, or None if it has none."""


def field_table(model: type[BaseModel], link: Link, *, without: Collection[str] = ()) -> str:
    """Return a table of the fields of a model, one line each: name, type with bounds, default, meaning.

    Args:
        model: the model class.
        link: returns the address of the section of another model.
        without: the fields to leave out.
    """
    schema = model.model_json_schema()
    required = set(schema.get("required", ()))
    rows = [
        (
            code(name),
            _type(field, link) + _bounds(field),
            "required" if name in required else _default(field, model, name),
            prose(str(field.get("description", ""))),
        )
        for name, field in schema.get("properties", {}).items()
        if name not in without
    ]
    return table(("field", "type", "default", "meaning"), rows)


def nested_models(model: type[BaseModel], skip: type[BaseModel]) -> list[type[BaseModel]]:
    """Return the models in a model's fields, outer ones first, without those derived from ``skip``."""
    models: dict[type[BaseModel], None] = {}
    for info in model.model_fields.values():
        for inner in _models_in(info.annotation):
            if not issubclass(inner, skip):
                models.update(dict.fromkeys([inner, *nested_models(inner, skip)]))
    return list(models)


def _models_in(annotation: Any) -> Iterable[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for inner in get_args(annotation):
        yield from _models_in(inner)


def _type(field: Mapping[str, Any], link: Link) -> str:
    if "anyOf" in field:
        options = [option for option in field["anyOf"] if option.get("type") != "null"]
        single = [_type(option, link) for option in options if option.get("type") != "array"]
        lists = [_type(option, link) for option in options if option.get("type") == "array"]
        if single and lists == [f"list of {' or '.join(single)}"]:
            lists = ["a list of them"]
        return " or ".join(dict.fromkeys([*single, *lists]))
    if "oneOf" in field:
        return "[an adaptation](#adaptations)"
    if "enum" in field:
        return ", ".join(code(str(value)) for value in field["enum"])
    if "const" in field:
        return code(str(field["const"]))
    if "$ref" in field:
        name = str(field["$ref"]).rpartition("/")[2]
        address = link(name)
        return f"[{name}]({address})" if address else name
    if field.get("type") == "array":
        pair = field.get("prefixItems")
        return f"list of {_type({'anyOf': pair} if pair else field.get('items', {}), link)}"
    return _WORDS.get(str(field.get("type", "")), "any")


def _bounds(field: Mapping[str, Any]) -> str:
    """Return the text after the type: `` >= 0, < 1`` for a number, ``, at least 1`` for the length of a list."""
    options: list[Mapping[str, Any]] = [field, *(o for o in field.get("anyOf", ()) if o.get("type") != "array")]
    bounds = [f"{sign} {option[key]:g}" for option in options for key, sign in _BOUNDS if key in option]
    return f"{' ' if bounds[0][0] in '<>' else ', '}{', '.join(bounds)}" if bounds else ""


def _default(field: Mapping[str, Any], model: type[BaseModel], name: str) -> str:
    value = field.get("default")
    if isinstance(model.model_fields[name].default, BaseModel):
        values = {k: v for k, v in value.items() if v is not None} if isinstance(value, Mapping) else {}
        return code(json.dumps(values)) if _says_something(values) else "none"
    return "none" if value is None or value in ([], ()) else code(json.dumps(value).strip('"'))


def _says_something(value: Any) -> bool:
    if isinstance(value, Mapping):
        return any(_says_something(inner) for inner in value.values())
    return value is not None
