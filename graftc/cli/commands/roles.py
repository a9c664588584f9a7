"""``graftc roles``: the roles of a model's weights, with the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.options import Json, Meta, ModelArgument
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from graftc.compiler.roles.structure import Structure

__all__ = ["roles"]


def roles(
    model: ModelArgument,
    meta: Meta = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a page that shows the graph with its roles.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html.")] = False,
    json: Json = False,
) -> None:
    """Show the roles found in a model, with the evidence, and what was not resolved."""
    from graftc.cli.output import print_json, steps, working

    with working(json) as warnings, steps(json) as step:
        if html is not None:
            from graftc.files.writing import check_destination

            check_destination(html, force=force)
        step("loading the model")
        from graftc.runtime.api import captured_roles
        from graftc.runtime.sources.models import load_model_and_inputs

        loaded, inputs = load_model_and_inputs(model, meta=meta)
        step("finding roles")
        structure, snapshot = captured_roles(loaded, inputs)
        if html is not None:
            from graftc.files.writing import write_text
            from graftc.runtime.view.contents import role_contents
            from graftc.runtime.view.page import page

            step("writing the page")
            write_text(html, page(role_contents(snapshot, structure)), force=force)
    if json:
        from graftc.cli.results import RolesResult

        places = {"model": model, "class": type(loaded).__name__}
        print_json(RolesResult.model_validate({**places, **structure.to_json(), "warnings": warnings}))
    else:
        _print(type(loaded).__name__, structure)


def _print(name: str, structure: Structure) -> None:
    from graftc.cli.output import console, print_table

    to = console()
    kinds = counted(len(structure.by_role()), "role")
    to.print(f"{name}: {counted(len(structure.findings))} of {kinds}, {len(structure.unresolved)} unresolved")
    to.print()
    print_table(to, ("role", "place", "rows", "layers", "evidence"), structure.rows(), whole=("place",))
    if structure.unresolved:
        to.print()
        print_table(to, ("unresolved", "layers", "reason"), structure.unresolved_rows())
