"""Records from JSON, and the JSON Schemas of records."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator, Mapping
from functools import cache
from itertools import pairwise
from typing import Any, TypeVar

from pydantic import TypeAdapter, computed_field, model_validator
from pydantic.json_schema import JsonSchemaMode

from graftc.specs.records.record import Record, stated_names, stated_properties
from graftc.specs.schema import SchemaWriter, without_raises

R = TypeVar("R")


def from_json(cls: type[R], raw: bytes | str) -> R:
    """Return a record from JSON.

    Raises:
        ValidationError: if a field is missing, or its value is of another type.
    """
    record: R = _adapter(cls).validate_json(raw)  # type: ignore[arg-type]
    return record


def json_schema(kind: Any, mode: JsonSchemaMode = "serialization") -> dict[str, Any]:
    """Return the JSON Schema of a record, or of a union of records."""
    return _adapter(kind).json_schema(mode=mode, by_alias=True, schema_generator=RecordSchema)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Return pydantic's reader of a type, built when it is first needed."""
    for cls in _records(Record):
        for name, member in stated_properties(cls).items():
            if vars(cls).get(name) is member:
                setattr(cls, name, computed_field(member))
        if isinstance(before := vars(cls).get("before_reading"), classmethod):
            cls.before_reading = model_validator(mode="before")(before)  # type: ignore[arg-type, attr-defined]
    return TypeAdapter(kind)


def _records(cls: type[Record]) -> Iterator[type[Record]]:
    for each in cls.__subclasses__():
        yield each
        yield from _records(each)


@cache
def _texts(cls: type[Record]) -> dict[str, str]:
    """Return the text below each field of a class and of its bases."""
    texts: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if issubclass(base, Record) and base is not Record:
            body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body  # type: ignore[attr-defined]
            for field, text in pairwise([*body, None]):
                if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                    name = field.target.id.rstrip("_")
                    texts.pop(name, None)
                    if isinstance(text, ast.Expr):
                        texts[name] = inspect.cleandoc(ast.literal_eval(text.value))
    return texts


class RecordSchema(SchemaWriter):
    """A JSON Schema generator for records: closed objects with published names, and the text of every field."""

    def dataclass_schema(self, schema: Any) -> dict[str, Any]:
        """Return the schema of a record: what its JSON contains, in order."""
        written, cls = super().dataclass_schema(schema), schema["cls"]
        if not issubclass(cls, Record):
            return written
        without_raises(written)
        names = [name.rstrip("_") for name in stated_names(cls)]
        texts, properties = _texts(cls), {name: written["properties"][name] for name in names}
        for name, value in properties.items():
            value.pop("readOnly", None)
            if name in texts:
                value["description"] = texts[name]
        required = [name for name in names if not (cls._optional and "default" in properties[name])]
        if not cls._optional:
            for value in properties.values():
                value.pop("default", None)
        return {**written, "properties": properties, "required": required, "additionalProperties": False}

    def generate(self, schema: Any, mode: JsonSchemaMode = "validation") -> dict[str, Any]:
        """Return a schema whose definitions have the published names of their classes."""
        written = super().generate(schema, mode)
        definitions = written.get("$defs", {})
        for cls in (written, *definitions.values()):
            for value in cls.get("properties", {}).values():
                same = definitions.get(value.get("$ref", "").removeprefix("#/$defs/"), {})
                if "description" in value and value["description"] == same.get("description"):
                    del value["description"]
        names = {key: value.get("title", key) for key, value in definitions.items()}
        renamed: dict[str, Any] = self.sort(_renamed(written, names))
        return renamed


def _renamed(value: Any, names: Mapping[str, str]) -> Any:
    """Return a schema with other names of definitions."""
    if isinstance(value, list):
        return [_renamed(each, names) for each in value]
    if not isinstance(value, dict):
        return value
    out = {key: _renamed(each, names) for key, each in value.items()}
    if isinstance(out.get("$ref"), str):
        name = out["$ref"].removeprefix("#/$defs/")
        out["$ref"] = f"#/$defs/{names.get(name, name)}"
    if isinstance(out.get("$defs"), dict):
        out["$defs"] = {names.get(name, name): each for name, each in out["$defs"].items()}
    return out
