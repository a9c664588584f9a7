"""The types of a manifest's fields: no value is converted, and all values are bounded. Does not import torch."""

from __future__ import annotations

import keyword
import math
import unicodedata
from typing import Annotated, ClassVar, TypeAlias

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from graftc.files.tensors import file_names
from graftc.records.places import Count
from graftc.runtime.sources.reference import MOST_LABELS

MANIFEST_BYTES, GRAPH_BYTES, TEXT_BYTES = file_names.MANIFEST_BYTES, 2**26, 2**24
"""The maximum sizes of a manifest, a graph and any other text, in bytes."""


def _bounded(shape: tuple[int, ...]) -> tuple[int, ...]:
    if math.prod(shape) >= 2**63:
        raise ValueError("too many elements")
    return shape


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("not a valid class name")
    return text


def _name(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text) or unicodedata.normalize("NFKC", text) != text:
        raise ValueError("not a valid input name")
    return text


def _axis(text: str) -> str:
    """Check and return the name of an axis, or a sum of two names, the second of which may be a number."""
    name, *more = text.split("+")
    if len(more) > 1:
        raise ValueError("not a valid axis name")
    return "+".join([_name(name), *(part if part.isdecimal() and len(part) < 10 else _name(part) for part in more)])


Digest: TypeAlias = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Shape: TypeAlias = Annotated[tuple[Count, ...], Field(max_length=16), AfterValidator(_bounded)]
Name: TypeAlias = Annotated[str, AfterValidator(_name)]
Flag: TypeAlias = bool | int | float | str | None
DType: TypeAlias = Annotated[str, Field(pattern=r"^(f64|f32|bf16|f16|i64|i32|i16|i8|u8|bool|c64)$")]
ElementType: TypeAlias = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")]
ClassName: TypeAlias = Annotated[str, Field(min_length=1, max_length=1024), AfterValidator(_printable)]
Settings: TypeAlias = Annotated[dict[str, bool | int | float | str], Field(max_length=4096)]
Labels: TypeAlias = Annotated[tuple[Annotated[str, Field(max_length=1024)], ...], Field(max_length=MOST_LABELS)]
AxisName: TypeAlias = Annotated[str, AfterValidator(_axis)]
Size: TypeAlias = Annotated[int, Field(ge=0, le=2**24)] | AxisName


class ManifestEntry(BaseModel):
    """Base class of everything in a manifest: frozen, without extra fields, and without conversions."""

    model_config: ClassVar[ConfigDict] = ConfigDict(
        frozen=True, extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class File(ManifestEntry):
    """One file of the folder."""

    bytes: Count
    """Its size."""

    sha256: Digest
    """Of its content."""
