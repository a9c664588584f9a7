"""``graftc demo``: the whole path on a real pretrained model and real data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from graftc.runtime.cli.options import Json

__all__ = ["demo"]


def demo(
    out: Annotated[
        Path, typer.Option("--out", "-o", metavar="DIR", help="A new folder, or that of an earlier demo.")
    ] = Path("demo-out"),
    quick: Annotated[bool, typer.Option("--quick", help="A subset of the data and no baseline.")] = False,
    json: Json = False,
) -> None:
    """Run the whole path on a pretrained encoder and Reuters R8: compile, train, fold, certify, export."""
    import sys

    from graftc.runtime.cli.output import console, print_json, working

    to = console(sys.stderr if json else sys.stdout)
    with working(json) as warnings:
        from graftc.runtime.demo.demo import run_demo

        result = run_demo(out, quick=quick, console=to)
    if json:
        from graftc.runtime.cli.results import DemoData

        print_json(DemoData.model_validate({**result.to_json(), "out": str(out), "warnings": warnings}))
    if not result.passed:
        raise typer.Exit(1)
