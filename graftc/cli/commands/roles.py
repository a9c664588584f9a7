"""``graftc roles``: show the roles of a model's weights, with the evidence."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.options import Meta, ModelArgument
from graftc.records.fields import GivenModel, ModelClass
from graftc.records.results import CommandResult
from graftc.records.roles import Finding, Sublayer, Unresolved, role_rows, unresolved_rows
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class RolesResult(CommandResult, behind={"sublayers": ("warnings",)}):
    """`graftc roles MODEL --json`."""

    model: GivenModel

    class_: ModelClass

    findings: tuple[Finding, ...]
    """Roles, in graph order."""

    unresolved: tuple[Unresolved, ...]
    """Weights without a role, with the reason."""

    sublayers: tuple[Sublayer, ...]
    """Branches of the residual stream, in graph order."""


@command()
def roles(
    run: CommandRun,
    model: ModelArgument,
    meta: Meta = False,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html", metavar="FILE", help="Write a page that shows the graph with its roles.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the --html file if it exists.")] = False,
) -> RolesResult:
    """Show the roles found in a model, with the evidence, and the weights without a role."""
    if html is not None:
        from graftc.files.writing import check_destination

        check_destination(html, force=force)
    run.step("loading the model")
    from graftc.runtime.api import captured_roles
    from graftc.runtime.sources.models import load_model_and_inputs

    loaded, inputs = load_model_and_inputs(model, meta=meta)
    run.step("finding roles")
    structure, snapshot = captured_roles(loaded, inputs)
    if html is not None:
        from graftc.files.writing import write_text
        from graftc.runtime.view.contents import role_contents
        from graftc.runtime.view.page import page

        run.step("writing the page")
        write_text(html, page(role_contents(snapshot, structure)), force=force)
    return RolesResult(
        model=model,
        class_=type(loaded).__name__,
        findings=structure.findings,
        unresolved=structure.unresolved,
        sublayers=structure.sublayers,
    )


@roles.shows
def _show(result: RolesResult, to: Console) -> None:
    from graftc.cli.output import print_table

    kinds = counted(len({f.role for f in result.findings}), "role")
    to.print(f"{result.class_}: {counted(len(result.findings))} of {kinds}, {len(result.unresolved)} unresolved")
    to.print()
    print_table(to, ("role", "place", "rows", "layers", "evidence"), role_rows(result.findings), whole=("place",))
    if result.unresolved:
        to.print()
        print_table(to, ("unresolved", "layers", "reason"), unresolved_rows(result.unresolved))
