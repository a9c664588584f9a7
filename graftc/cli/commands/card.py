"""``graftc card``: write a model card for an artifact. The base is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.options import ArtifactArgument
from graftc.records.cards import CardMetadata
from graftc.records.fields import ArtifactFolder
from graftc.records.results import CommandResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class CardResult(CommandResult, behind={"metadata": ("warnings",)}):
    """`graftc card DIR --json`."""

    artifact: ArtifactFolder

    out: str | None = None
    """The file that was written; null where none was."""

    card: str
    """The card, Markdown."""

    metadata: CardMetadata
    """Its metadata."""


@command()
def card(
    run: CommandRun,
    directory: ArtifactArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write; by default the card is printed. The file cannot be inside the artifact.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ID",
            help="The base's hub id. Default: the id by which it was loaded, if any.",
            show_default=False,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option(
            "--license", metavar="ID", help="The license, as a hub id such as apache-2.0.", show_default=False
        ),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option("--language", metavar="CODE", help="A language, such as en; may be repeated.", show_default=False),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG", help="An additional tag; may be repeated.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out if it exists.")] = False,
) -> CardResult:
    """Write a model card for the Hugging Face hub: metadata, figures, sites, spec, what folds, and how to use it."""
    from graftc.files.writing import write_text
    from graftc.runtime.artifact import open_artifact
    from graftc.runtime.card.facts import artifact_facts
    from graftc.runtime.card.page import render_card

    run.out, run.force = out, force
    run.require_destination(directory)
    facts = artifact_facts(open_artifact(directory))
    text, metadata = render_card(facts, base_model=base_model, license=license, language=language or (), tags=tag or ())
    if out is not None:
        write_text(out, text, force=force)
    return CardResult(artifact=str(directory), out=None if out is None else str(out), card=text, metadata=metadata)


@card.shows
def _show(result: CardResult, to: Console) -> None:
    if result.out is None:
        to.print(result.card, end="", soft_wrap=True, markup=False)
    else:
        to.print(f"wrote {result.out}", soft_wrap=True, markup=False)
