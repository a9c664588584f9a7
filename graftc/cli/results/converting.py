"""Result of ``graftc convert``."""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import Field

from graftc.cli.results.base import DiagnosticData, FileData, Result
from graftc.specs.base_model import Items

__all__ = ["ConvertResult", "ConvertedSiteData"]


class ConvertedSiteData(Result):
    """What became of one site, or of one map of an adapter folder."""

    adaptation: str | None
    """The adaptation; null for an adapter folder."""

    site: str
    """Where: a site, or the path of a map in the base; `<...>.experts.3.gate_proj` for an expert's."""

    rank: int | None
    """Rank of the LoRA there; null for an adapter folder."""

    full_rank: int | None
    """Rank of the original update; null for an adapter folder."""

    error: float = Field(ge=0)
    """Distance of the new update from the original one, over the norm of that (Frobenius norm)."""

    probed: float = Field(ge=0)
    """The same on random inputs, computed from what was made: the compiled LoRA, or the written files."""


class ConvertResult(Result):
    """`graftc convert DIR --out DIR2 --json`."""

    source: str
    """The DIR argument."""

    out: str | None
    """What was written; null with `--dry-run`."""

    dry_run: bool
    """Whether nothing was written."""

    from_form: str
    """`artifact`, or the layout of the adapter folder."""

    to_form: str
    """`lora`, or the layout that was written."""

    rank: int = Field(ge=1)
    """The largest rank."""

    largest_error: float = Field(ge=0)
    """The worst site's error."""

    sites: Items[ConvertedSiteData]
    """Every site or map."""

    outputs: Mapping[str, float] | None
    """By output, the largest absolute difference between both models on random inputs; null for an adapter folder."""

    largest_output: float | None
    """The largest absolute number among these outputs; null for an adapter folder."""

    into_base: Items[str]
    """What was folded into a base inside of the new artifact."""

    files: Items[FileData]
    """The files that were written."""

    warnings: Items[DiagnosticData]
    """Warnings."""
