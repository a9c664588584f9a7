"""Base classes for everything in a spec: frozen, strict, without unknown fields, and with coded errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    GetJsonSchemaHandler,
    PrivateAttr,
    ValidationError,
    field_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, from_json

from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.limits import check_limits
from graftc.specs.schema import SchemaWriter, without_raises
from graftc.specs.source import Source
from graftc.specs.spec_errors import explain, refuse

T = TypeVar("T")

Items = Annotated[Sequence[T], AfterValidator(tuple)]
"""A list in a document; a tuple in Python, so that specs stay frozen and hashable."""


class _Coded(type(BaseModel)):  # type: ignore[misc]
    """Metaclass that turns a failed construction into a GraftError.

    Pydantic constructs nested models without calling it.
    """

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        check_limits(kwargs)
        try:
            return super().__call__(*args, **kwargs)
        except ValidationError as error:
            raise explain(error, cls, kwargs) from None


if TYPE_CHECKING:
    _Base = BaseModel
else:

    class _Base(BaseModel, metaclass=_Coded):
        pass


class SpecModel(_Base):
    """Base of all spec models.

    Frozen and hashable; unknown fields and loose types (``"8"`` or ``true`` for 8) are errors. Attribute
    docstrings are the descriptions in the JSON Schema.

    Raises:
        GraftError: GC002 to GC012, when a value is not allowed.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True,
        defer_build=True,  # listing methods needs the fields of many specs, but no validators
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        json_schema_extra=without_raises,
    )

    @classmethod
    def _conditions(cls) -> list[dict[str, Any]]:
        """Return the JSON Schema's conditions on values, in addition to the types of fields; none by default."""
        return []

    @classmethod
    def __get_pydantic_json_schema__(cls, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        written = handler(schema)
        if conditions := cls._conditions():
            handler.resolve_ref_schema(written)["allOf"] = conditions
        return written

    @classmethod
    def model_json_schema(cls, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Return the JSON Schema as pydantic does, but without field titles."""
        return super().model_json_schema(*args, **{"schema_generator": SchemaWriter, **kwargs})

    @classmethod
    def model_validate_json(cls, json_data: str | bytes | bytearray, **kwargs: Any) -> Self:
        """Validate JSON as pydantic does, but raise a GraftError on failure.

        ``graftc.specs.parse_spec`` also reports line and column.
        """
        try:
            check_limits(from_json(json_data))
        except ValueError as error:
            raise GraftError("GC001", f"not valid JSON: {error}") from None
        try:
            return super().model_validate_json(json_data, **kwargs)
        except ValidationError as error:
            raise explain(error, cls, from_json(json_data)) from None

    @classmethod
    def model_validate(cls, obj: Any, **kwargs: Any) -> Self:
        """Validate data as pydantic does, but raise a GraftError on failure."""
        check_limits(obj)
        try:
            return super().model_validate(obj, **kwargs)
        except ValidationError as error:
            raise explain(error, cls, obj) from None


class Document(SpecModel):
    """Base of whole documents, which know where in their text each value is."""

    version: Literal[1] = 1
    """Version of this format."""

    _source: Source = PrivateAttr(default_factory=Source)

    @field_validator("version", mode="before")
    @classmethod
    def _version_is_a_number(cls, version: Any) -> Any:
        if isinstance(version, bool):  # which equals 1 in Python
            message = f"spec version {str(version).lower()} is not supported"
            refuse((), message, hint="this release reads version 1", code="GC007")
        return version

    def place(self, path: str) -> Place:
        """Return the place of a path such as ``adapt[0].target.role``, with line and column if it is from a file."""
        return self._source.place(path)

    def locate(self, error: GraftError) -> GraftError:
        """Return the error with file, line, column and corrected line filled in from the path of its place."""
        return self._source.locate(error)
