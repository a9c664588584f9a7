"""The metadata of a model card."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.specs.records.record import Record


@dataclass(frozen=True, kw_only=True)
class CardMetadata(Record, published="CardMetadata", optional=True):
    """The card's metadata, as in its first lines. What is not known is null, and not in the card."""

    library_name: str
    """`graftc`."""

    base_model: str | None = None
    """The base's id on the hub."""

    base_model_relation: str | None = None
    """`adapter`, where there is a base."""

    pipeline_tag: str | None = None
    """The hub's task."""

    license: str | None = None
    """The hub's id of a license."""

    language: tuple[str, ...] = ()
    """Codes of languages."""

    tags: tuple[str, ...]
    """`graftc`, the methods, and what was given."""
