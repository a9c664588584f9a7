"""``graftc card``: write a model card for an artifact, a merged model or a PEFT adapter. The base is not needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.options import folder_argument
from graftc.records.cards import CardMetadata
from graftc.records.fields import DescribedFolder
from graftc.records.results import CommandResult

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class CardResult(CommandResult, behind={"metadata": ("warnings",)}):
    """`graftc card DIR --json`."""

    artifact: DescribedFolder

    out: str | None = None
    """The file that was written; null where none was."""

    card: str
    """The card, Markdown."""

    metadata: CardMetadata
    """Its metadata."""


@command()
def card(
    run: CommandRun,
    directory: Annotated[
        Path,
        folder_argument("An artifact, a merged model with its graftc.json, or a PEFT adapter."),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write; by default the card is printed. Inside DIR, this can only be its README.md, and not "
            "in an artifact.",
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
            "--license",
            metavar="ID",
            help="The license, as a hub id such as apache-2.0. Default: that of the base, if its own card is "
            "on this machine.",
            show_default=False,
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
    dataset: Annotated[
        list[str] | None,
        typer.Option("--dataset", metavar="ID", help="A data set on the hub; may be repeated.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out if it exists.")] = False,
) -> CardResult:
    """Write a model card for the Hugging Face hub: metadata, figures, places, what was or can be folded, and use."""
    from graftc.files.writing import recover, write_text
    from graftc.runtime.card.folders import folder_card, takes_card
    from graftc.runtime.card.metadata import StatedMetadata

    run.out, run.force = out, force
    if out is not None and takes_card(directory, out):
        recover(directory)  # what a killed run left in the folder is not listed
        run.require_destination()
    else:
        run.require_destination(directory)
    text, metadata = folder_card(
        directory, StatedMetadata(base_model, license, language or (), tag or (), dataset or ())
    )
    if out is not None:
        write_text(out, text, force=force)
    return CardResult(artifact=str(directory), out=None if out is None else str(out), card=text, metadata=metadata)


@card.shows
def _show(result: CardResult, to: Console) -> None:
    if result.out is None:
        to.print(result.card, end="", soft_wrap=True, markup=False)
    else:
        to.print(f"wrote {result.out}", soft_wrap=True, markup=False)
