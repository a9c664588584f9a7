"""The metadata of a model card."""

from __future__ import annotations

from dataclasses import dataclass

from graftc.specs.records.record import Record


@dataclass(frozen=True, kw_only=True)
class CardMetadata(Record, published="CardMetadata", optional=True):
    """The card's metadata, as in its first lines. What is not known is null, and not in the card."""

    library_name: str | None = None
    """The library that loads the folder: `graftc`, `peft` or `transformers`."""

    base_model: str | None = None
    """The base's id on the hub."""

    base_model_relation: str | None = None
    """`adapter`, or `finetune` for a merged model, where there is a base."""

    pipeline_tag: str | None = None
    """The hub's task."""

    license: str | None = None
    """The hub's id of a license: as given, or that of the base."""

    language: tuple[str, ...] = ()
    """Codes of languages."""

    datasets: tuple[str, ...] = ()
    """Hub ids of data sets, as given."""

    tags: tuple[str, ...]
    """`graftc` for folders that only graftc writes, the methods, and what was given."""
