"""``graftc card``: a model card of an artifact. The base is not needed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftc.cli.options import ArtifactArgument, Json

__all__ = ["card"]


def card(
    directory: ArtifactArgument,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Where to write; by default the card is printed. Not into the artifact, which holds no other files.",
            show_default=False,
        ),
    ] = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            "--base-model",
            metavar="ID",
            help="The base's id on the hub. Default: the one by which it was loaded, if it was.",
            show_default=False,
        ),
    ] = None,
    license: Annotated[
        str | None,
        typer.Option("--license", metavar="ID", help="The hub's id of a license: apache-2.0.", show_default=False),
    ] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            "--language", metavar="CODE", help="A language, as en; may be given several times.", show_default=False
        ),
    ] = None,
    tag: Annotated[
        list[str] | None,
        typer.Option("--tag", metavar="TAG", help="One more tag; may be given several times.", show_default=False),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite --out if it exists.")] = False,
    json: Json = False,
) -> None:
    """Write a model card for the Hugging Face hub: metadata, figures, places, spec, what folds, how to use it."""
    from graftc.cli.output import console, print_json, working

    with working(json) as warnings:
        from graftc.files.writing import check_apart, check_destination, write_text
        from graftc.runtime.artifact import open_artifact
        from graftc.runtime.card.facts import artifact_facts
        from graftc.runtime.card.page import render_card

        if out is not None:
            check_apart(out, directory)
            check_destination(out, force=force)
        facts = artifact_facts(open_artifact(directory))
        chosen = {"base_model": base_model, "license": license}
        text, metadata = render_card(facts, **chosen, language=language or (), tags=tag or ())
        if out is not None:
            write_text(out, text, force=force)
    if json:
        from graftc.cli.results import CardResult

        written = None if out is None else str(out)
        result = {"artifact": str(directory), "out": written, "card": text, "metadata": metadata, "warnings": warnings}
        print_json(CardResult.model_validate(result))
    elif out is None:
        console().print(text, end="", soft_wrap=True, markup=False)
    else:
        console().print(f"wrote {out}", soft_wrap=True, markup=False)
