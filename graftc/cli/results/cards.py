"""Result of ``graftc card``."""

from __future__ import annotations

from pydantic import Field

from graftc.cli.results.base import DiagnosticData, Result
from graftc.specs.base_model import Items

__all__ = ["CardMetadata", "CardResult"]


class CardMetadata(Result):
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

    language: Items[str] = Field(default=())
    """Codes of languages."""

    tags: Items[str]
    """`graftc`, the methods, and what was given."""


class CardResult(Result):
    """`graftc card DIR --json`."""

    artifact: str
    """The artifact's folder."""

    out: str | None
    """The file that was written; null where none was."""

    card: str
    """The card, Markdown."""

    metadata: CardMetadata
    """Its metadata."""

    warnings: Items[DiagnosticData]
    """Warnings."""
