"""Parts of a spec's JSON Schema beyond types, so that editors suggest and reject the same values as the parser."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

from pydantic import WithJsonSchema
from pydantic.json_schema import GenerateJsonSchema
from typing_extensions import TypeAliasType

from graftc.specs.roles import ROLES


class SchemaWriter(GenerateJsonSchema):
    """JSON Schema generator that omits the titles of fields, which only repeat their names."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        """Return False, so that no field has a title."""
        return False


def without_raises(schema: dict[str, Any]) -> None:
    """Remove the section on exceptions, which only concerns Python, from a model's description."""
    text = str(schema.get("description", ""))
    if "\n\nRaises:" in text:
        schema["description"] = text[: text.index("\n\nRaises:")]


def needs_one_of(fields: Sequence[str]) -> dict[str, Any]:
    """Return a schema that requires at least one of these fields to be present and not null."""
    return {"anyOf": [{"required": [f], "properties": {f: {"not": {"type": "null"}}}} for f in fields]}


def _role() -> dict[str, Any]:
    names = "|".join(name.replace(".", r"\.") for name in ROLES)
    prefixed = rf"^((encoder|decoder)\.)?(cross\.)?({names})$"
    return {
        "description": "What a place does in the architecture. `encoder.`, `decoder.` and `cross.` may stand before "
        "it, in this order, and braces write several at once: `attn.{q,v}`.",
        # Editors offer the values of the list; the patterns define what is allowed.
        "anyOf": [
            {"enum": list(ROLES)},
            {"type": "string", "pattern": prefixed},
            {"type": "string", "pattern": r"^[a-z.,{}]*\{[a-z.,{}]*\}[a-z.,{}]*$"},
        ],
        "examples": ["attn.q", "attn.{q,v}", "ffn.down", "decoder.cross.attn.k"],
    }


def _text(description: str, examples: Sequence[str]) -> dict[str, Any]:
    return {
        "type": "string",
        "pattern": r"\S",
        "maxLength": 1000,
        "description": description,
        "examples": list(examples),
    }


_GLOB = "A glob of module paths: `*` within one segment, `**` any number of segments, `{a,b}` either."
_GLOBS = ("classifier", "**.query", "**.layer.*.attention.**")
_REGEX = "A regular expression that matches a whole module path."
_REGEXES = (r".*\.(query|value)",)
_INDEX = r"\s*-?[0-9]{1,9}\s*"
_SLICE = r"\s*(-?[0-9]{1,9})?\s*:\s*(-?[0-9]{1,9})?\s*(:\s*((?=[0-9]{1,9}(\D|$))0*[1-9][0-9]*)?\s*)?"
_LAYER: dict[str, Any] = {
    "description": 'A layer by its index, or a slice as in Python: `"0:6"`; negative ones count from the end.',
    "anyOf": [{"type": "integer"}, {"type": "string", "pattern": f"^({_INDEX}|{_SLICE})$"}],
    "examples": [0, -1, "0:6", "-4:", "::2"],
}
_ROW: dict[str, Any] = {
    "description": "A row by its number from 0, or a slice as in Python; negative ones count from the end.",
    "anyOf": _LAYER["anyOf"],
    "examples": [0, -1, "0:16", "-4:", "::2"],
}
_NAME = "A name for an adaptation: letters, digits and underscores, not starting with a digit or two underscores."
_NAMES: dict[str, Any] = {
    "type": "string",
    "pattern": "^(_|_?[A-Za-z][A-Za-z0-9_]*|_[0-9][A-Za-z0-9_]*)$",
    "maxLength": 100,
    "description": _NAME,
    "examples": ["attention", "inner"],
}

if TYPE_CHECKING:
    RoleName: TypeAlias = str
    Glob: TypeAlias = str
    Regex: TypeAlias = str
    Layer: TypeAlias = int | str
    RowNumber: TypeAlias = int | str
    AdaptationName: TypeAlias = str
else:
    # Named types are written once, under $defs, by these names: a field reads as "glob or list of glob".
    RoleName = TypeAliasType("role", Annotated[str, WithJsonSchema(_role())])
    """A role as written."""
    Glob = TypeAliasType("glob", Annotated[str, WithJsonSchema(_text(_GLOB, _GLOBS))])
    """A glob of module paths."""
    Regex = TypeAliasType("regex", Annotated[str, WithJsonSchema(_text(_REGEX, _REGEXES))])
    """A regular expression of module paths."""
    Layer = TypeAliasType("layer", Annotated[int | str, WithJsonSchema(_LAYER)])
    """A layer or a slice of layers."""
    RowNumber = Annotated[int | str, WithJsonSchema(_ROW)]
    """A row or a slice of rows."""
    AdaptationName = TypeAliasType("name", Annotated[str, WithJsonSchema(_NAMES)])
    """The name of an adaptation."""
