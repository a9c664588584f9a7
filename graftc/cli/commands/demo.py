"""``graftc demo``: run the whole workflow on a real pretrained model and real data."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.records.applications.demo import DemoResult, LLMResult


@command(live=True)
def demo(
    run: CommandRun,
    llm: Annotated[
        bool, typer.Option("--llm", help="Fine-tune a chat model, SmolLM2-135M-Instruct, instead of an encoder.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="DIR",
            help="A new folder, or the folder of an earlier demo. Default: demo-out, or with --llm demo-llm-out.",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Use fewer steps and texts, and skip the comparison.")] = False,
) -> DemoResult | LLMResult:
    """Run the whole workflow on a pretrained model and Reuters R8: compile, train, fold, certify, save, export."""
    from graftc.cli.output import console

    to = console(sys.stderr if run.as_json else sys.stdout)
    result: DemoResult | LLMResult
    with run.working():
        if llm:
            from graftc.applications.demo.llm import run_llm_demo

            result = run_llm_demo(out or Path("demo-llm-out"), quick=quick, console=to)
        else:
            from graftc.applications.demo.demo import run_demo

            result = run_demo(out or Path("demo-out"), quick=quick, console=to)
    run.status = 1 if result.failures else 0
    return result


@demo.shows
def _show(result: DemoResult | LLMResult, to: object) -> None:
    """Show nothing more: the demo has printed its stages."""
