"""``graftc diff``: what differs between two artifacts."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.runtime.cli.completion import artifacts
from graftc.runtime.cli.options import Json

if TYPE_CHECKING:
    from graftc.runtime.artifact.compare import Comparison

__all__ = ["diff"]

_Artifact = Annotated[Path, typer.Argument(help="An artifact.", show_default=False, autocompletion=artifacts)]


def diff(a: _Artifact, b: _Artifact, json: Json = False) -> None:
    """Show what differs between two artifacts: base, spec, sites, tensors, graph. Exit status 1 if anything does."""
    from graftc.runtime.cli.output import print_json, working

    with working(json) as warnings:
        from graftc.runtime.artifact import open_artifact
        from graftc.runtime.artifact.compare import compare

        found = compare(open_artifact(a), open_artifact(b))
    if json:
        from graftc.runtime.cli.results import DiffResult

        result = {**_data(found), "a": str(a), "b": str(b), "warnings": warnings}
        print_json(DiffResult.model_validate(result))
    else:
        _print(found)
    if not found.same:
        raise typer.Exit(1)


def _data(found: Comparison) -> dict[str, Any]:
    return {
        "same": found.same,
        "base": list(found.base),
        "spec": found.spec,
        "sites": {"added": list(found.added), "removed": list(found.removed), "changed": list(found.changed)},
        "tensors": [{"name": t.name, "status": t.status, "largest_difference": t.largest} for t in found.tensors],
        "graph": found.graph,
    }


def _print(found: Comparison) -> None:
    from graftc.runtime.cli.output import console, print_lines

    to = console()
    if found.same:
        to.print("no difference")
        return
    colours = {"+": "green", "-": "red", "@": "cyan", "~": "yellow"}
    marks = [*(f"+ {p}" for p in found.added), *(f"- {p}" for p in found.removed), *(f"~ {p}" for p in found.changed)]
    signs = {"added": "+", "removed": "-", "changed": "~", "moved": "~"}
    tensors = [
        f"{signs[t.status]} {t.name} ({t.status}" + (f", by at most {t.largest:.3g})" if t.largest is not None else ")")
        for t in found.tensors
    ]
    sections = {
        "base": _capped([f"~ {difference}" for difference in found.base]),
        "spec": found.spec.splitlines(),
        "places": marks,
        "tensors": tensors,
        "graph (eval)": found.graph.splitlines(),
    }
    for name, lines in sections.items():
        if lines:
            print_lines(to, [name], lambda _: "bold")
            print_lines(to, [f"  {line}" for line in lines], lambda line: colours.get(line[2:3], ""))


def _capped(lines: list[str], most: int = 5) -> list[str]:
    """Another base differs everywhere; JSON has all of it."""
    return lines if len(lines) <= most + 1 else [*lines[:most], f"... and {len(lines) - most} more"]
