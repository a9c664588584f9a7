"""``graftc serve-check``: state what a serving engine does with a folder, and run it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.serving_options import EngineOption, ServedBaseOption
from graftc.records.results import CommandResult
from graftc.records.serving.certificates import ServingCertificate
from graftc.specs.errors.text import counted

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class ServeCheckResult(CommandResult, behind={"certificate": ("warnings",)}):
    """`graftc serve-check FOLDER --engine ENGINE --json`. The exit status is 1 where it did not pass."""

    folder: str
    """The FOLDER argument."""

    certificate: ServingCertificate
    """A statement of how the engine treats the folder."""


@command()
def serve_check(
    run: CommandRun,
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="FOLDER",
            help="A PEFT folder, a GGUF file (an adapter or a model), a model folder, or a folder of onnx-generate.",
            show_default=False,
        ),
    ],
    engine: EngineOption,
    base: ServedBaseOption = None,
    running: Annotated[
        bool, typer.Option("--run", help="Run the installed engine, and compare its tokens with graftc's.")
    ] = False,
    python: Annotated[
        Path | None,
        typer.Option(
            "--python",
            metavar="FILE",
            help="With --run, the interpreter of the environment in which the engine is installed.",
            show_default=False,
        ),
    ] = None,
) -> ServeCheckResult:
    """State whether a serving engine applies every tensor of an adapter with its scale, or loads a whole model."""
    from graftc.applications.serving.checking import serve_check as check

    certificate = check(folder, engine, base=base, run=running, python=python, step=run.step)
    run.status = 0 if certificate.passed else 1
    return ServeCheckResult(folder=str(folder), certificate=certificate)


@serve_check.shows
def _show(result: ServeCheckResult, to: Console) -> None:
    own = result.certificate
    if own.total:
        scales = sorted({site.scale for site in own.sites})
        ranks = sorted({site.rank for site in own.sites})
        at = f" at {counted(len(own.sites))}" if own.sites else ""
        to.print(f"{own.applied} of {own.total} tensors applied{at}", soft_wrap=True, markup=False)
        if own.sites:
            to.print(f"scale {_span(scales)}, rank {_span(ranks)}", soft_wrap=True, markup=False)
    for problem in own.problems:
        to.print(f"{problem.kind + ':':<12}{problem}", soft_wrap=True, markup=False)
    if own.run is not None:
        ran = own.run
        text = f"{own.engine} {ran.version}: {ran.equal} of {ran.prompts} prompts equal, up to {ran.tokens} tokens each"
        to.print(text, soft_wrap=True, markup=False)
        if not ran.changed:
            to.print("the adapter changes no token, so the run proves nothing", soft_wrap=True, markup=False)
    if own.needs is not None:
        to.print(f"the engine needs: {own.needs}", soft_wrap=True, markup=False)
    verdict = "served as it is meant" if own.passed else "NOT served as it is meant"
    to.print(f"{result.folder}: {verdict} by {own.read}, read on {own.read_on}", soft_wrap=True, markup=False)


def _span(numbers: list[float] | list[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least:g}" if least == most else f"{least:g} to {most:g}"
