"""``graftc demo``: the whole path on a real pretrained model and real data."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.options import Json

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.applications.demo.stages import Outcome

__all__ = ["demo"]


def demo(
    llm: Annotated[
        bool, typer.Option("--llm", help="Fine-tune a chat model, SmolLM2-135M-Instruct, instead of an encoder.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="A new folder, or that of an earlier demo; by default demo-out, with --llm demo-llm-out.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer steps and texts, and nothing to compare with.")] = False,
    json: Json = False,
) -> None:
    """Run the whole path on a pretrained model and Reuters R8: compile, train, fold, certify, save, export."""
    import sys

    from graftc.cli.output import console, print_json, working

    to = console(sys.stderr if json else sys.stdout)
    place = out or Path("demo-llm-out" if llm else "demo-out")
    with working(json) as warnings:
        result = _run(llm, place, quick, to)
    if json:
        from graftc.cli.results import DemoData, LLMDemoData

        data = {**result.to_json(), "out": str(place), "warnings": warnings}
        print_json((LLMDemoData if llm else DemoData).model_validate(data))
    if result.failures:
        raise typer.Exit(1)


def _run(llm: bool, out: Path, quick: bool, to: Console) -> Outcome:
    if llm:
        from graftc.applications.demo.llm import run_llm_demo

        return run_llm_demo(out, quick=quick, console=to)
    from graftc.applications.demo.demo import run_demo

    return run_demo(out, quick=quick, console=to)
