"""``graftc diff``: the differences between two artifacts, or between the weights of two model folders."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli.completion import models
from graftc.cli.options import Json

if TYPE_CHECKING:
    from graftc.runtime.artifact.compare import Comparison
    from graftc.runtime.compare.folders import FolderDifference

__all__ = ["diff"]

_Folder = Annotated[
    Path, typer.Argument(help="An artifact, or a folder of a model.", show_default=False, autocompletion=models)
]


def diff(
    a: _Folder,
    b: _Folder,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a page that shows the graph of the first artifact before, and that of the second after.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace the file of --html.")] = False,
    json: Json = False,
) -> None:
    """Show what differs between two artifacts (base, spec, sites, tensors, graph) or between the weights of two model
    folders, with what could have made it. Exit status 1 if anything does.
    """
    from graftc.cli.output import print_json, steps, time_left, working

    weights: FolderDifference | None = None
    with working(json) as warnings, steps(json) as step:
        _check(html, force, a, b)
        from graftc.runtime.artifact import open_artifact
        from graftc.runtime.artifact.compare import compare, nothing

        if _are_models(a, b):
            if html is not None:
                from graftc.specs.errors.diagnostics import GraftError

                raise GraftError("GC090", "--html shows graphs, and these folders hold weights", hint="leave it out")
            from graftc.runtime.compare.folders import compare_folders

            weights, comparison = compare_folders(a, b, time_left(step, "comparing weights")), nothing()
        else:
            comparison = compare(open_artifact(a), open_artifact(b))
            if html is not None:
                step("writing the page")
                _write_page(a, b, comparison, html, force)
    same = comparison.same if weights is None else weights.same
    if json:
        from graftc.cli.results import DiffResult

        data = {**_data(comparison), "same": same, "weights": None if weights is None else _weights(weights)}
        print_json(DiffResult.model_validate({**data, "a": str(a), "b": str(b), "warnings": warnings}))
    elif weights is None:
        _print(comparison)
    else:
        _print_weights(weights)
    if not same:
        raise typer.Exit(1)


def _are_models(a: Path, b: Path) -> bool:
    """Return whether the two folders contain models to compare, and not artifacts.

    Raises:
        GraftError: GC090 for one of each.
    """
    from graftc.runtime.artifact.places import is_artifact
    from graftc.runtime.compare.folders import is_model_folder
    from graftc.specs.errors.diagnostics import GraftError

    ours = [is_artifact(path) and not is_model_folder(path) for path in (a, b)]
    models = [not own and (is_model_folder(path) or _has_config(path)) for own, path in zip(ours, (a, b), strict=True)]
    if any(ours) and any(models):
        one, other = (a, b) if ours[0] else (b, a)
        hint = f"merge it first, and compare the folders: graftc merge {one} --out DIR"
        raise GraftError("GC090", f"{one} is an artifact and {other} a folder of a model", hint=hint)
    return any(models)


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def _data(comparison: Comparison) -> dict[str, Any]:
    return {
        "same": comparison.same,
        "base": list(comparison.base),
        "spec": comparison.spec,
        "sites": {
            "added": list(comparison.added),
            "removed": list(comparison.removed),
            "changed": list(comparison.changed),
        },
        "tensors": [{"name": t.name, "status": t.status, "largest_difference": t.largest} for t in comparison.tensors],
        "graph": comparison.graph,
    }


def _check(html: Path | None, force: bool, *folders: Path) -> None:
    from graftc.files.writing import check_apart, check_destination

    if html is not None:
        for folder in folders:
            check_apart(html, folder)
        check_destination(html, force=force)


def _write_page(a: Path, b: Path, comparison: Comparison, html: Path, force: bool) -> None:
    from dataclasses import replace

    from graftc.files.writing import write_text
    from graftc.runtime.artifact import open_artifact
    from graftc.runtime.view.contents import contents
    from graftc.runtime.view.evidence import evidence_of_artifact
    from graftc.runtime.view.page import page

    before, after = open_artifact(a), open_artifact(b)
    sections = _sections(comparison)
    sections["spec"] = [
        line for line in sections["spec"] if not line.startswith(("--- ", "+++ "))
    ]  # these lines contain paths of this machine
    differences = [{"what": name, "lines": lines} for name, lines in sections.items() if lines]
    title = f"{before.path.name} and {after.path.name} compared"
    evidence = replace(evidence_of_artifact(after), differences=differences, title=title)
    write_text(html, page(contents(after.snapshot, evidence, before.snapshot)), force=force)


def _sections(comparison: Comparison) -> dict[str, list[str]]:
    marks = [
        *(f"+ {p}" for p in comparison.added),
        *(f"- {p}" for p in comparison.removed),
        *(f"~ {p}" for p in comparison.changed),
    ]
    signs = {"added": "+", "removed": "-", "changed": "~", "moved": "~"}
    tensors = [
        f"{signs[t.status]} {t.name} ({t.status}" + (f", by at most {t.largest:.3g})" if t.largest is not None else ")")
        for t in comparison.tensors
    ]
    return {
        "base": _capped([f"~ {difference}" for difference in comparison.base]),
        "spec": comparison.spec.splitlines(),
        "places": marks,
        "tensors": tensors,
        "graph (eval)": comparison.graph.splitlines(),
    }


def _print(comparison: Comparison) -> None:
    from graftc.cli.output import console, print_lines

    to = console()
    if comparison.same:
        to.print("no difference")
        return
    colours = {"+": "green", "-": "red", "@": "cyan", "~": "yellow"}
    for name, lines in _sections(comparison).items():
        if lines:
            print_lines(to, [name], lambda _: "bold")
            print_lines(to, [f"  {line}" for line in lines], lambda line: colours.get(line[2:3], ""))


def _capped(lines: list[str], most: int = 5) -> list[str]:
    """Return the first lines and how many follow: another base differs everywhere. JSON lists all of them."""
    return lines if len(lines) <= most + 1 else [*lines[:most], f"... and {len(lines) - most} more"]


def _weights(difference: FolderDifference) -> dict[str, Any]:
    from dataclasses import asdict

    def numbers(item: Any) -> dict[str, Any] | None:
        if item.difference is None:
            return None
        data = {**asdict(item.difference), "cause": item.difference.cause.value}
        data |= {key: data[key] if math.isfinite(data[key]) else None for key in ("largest", "norm")}
        return data

    tensors = [
        {**{"name": t.name, "status": t.status, "base": t.base, "other": t.other}, "difference": numbers(t)}
        for t in difference.tensors
    ]
    return {"equal": difference.equal, "tensors": tensors}


def _print_weights(difference: FolderDifference) -> None:
    from graftc.cli.output import console, print_lines
    from graftc.runtime.compare.folders import lines, summary

    to = console()
    equal = f"{difference.equal} tensors are equal" if difference.equal != 1 else "1 tensor is equal"
    if difference.same:
        to.print(f"no difference: {equal}")
        return
    colours = {"+": "green", "-": "red", "~": "yellow"}
    print_lines(to, ["tensors"], lambda _: "bold")
    print_lines(to, [f"  {line}" for line in lines(difference)], lambda line: colours.get(line[2:3], ""))
    causes = summary(difference)
    if causes:
        print_lines(to, ["what could have made it"], lambda _: "bold")
        print_lines(to, [f"  {line}" for line in causes], lambda _: "")
    to.print(
        f"{len(difference.tensors)} of {len(difference.tensors) + difference.equal} tensors differ",
        soft_wrap=True,
        markup=False,
    )
