"""``graftc diff``: show the differences between two artifacts, or between the weights of two model folders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.completion import models
from graftc.records.comparison import Comparison, WeightsDiff
from graftc.records.fields import Warnings
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.records.record import stated

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class DiffResult(Comparison, behind={"": ("a", "b")}):
    """`graftc diff A B --json`. The exit status is 1 where they differ."""

    a: str
    """The first folder: an artifact's, or a model's."""

    b: str
    """The second folder."""

    weights: WeightsDiff | None = None
    """The differences between two models, for which the fields above are empty; null for artifacts."""

    warnings: Warnings = ()

    @stated
    def same(self) -> bool:
        """Whether nothing differs."""
        return Comparison.same.__get__(self) if self.weights is None else self.weights.same


_SIGNS = {"+": "green", "-": "red", "@": "cyan", "~": "yellow"}
"""The colours of lines, by their first character."""

_Folder = Annotated[
    Path, typer.Argument(help="An artifact or a model folder.", show_default=False, autocompletion=models)
]


@command()
def diff(
    run: CommandRun,
    a: _Folder,
    b: _Folder,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a page that shows the first artifact's graph as before, and the second's as after.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite the --html file if it exists.")] = False,
) -> DiffResult:
    """Show the differences between two artifacts (base, spec, sites, tensors, graph) or the weights of two model
    folders, with their likely causes. The exit status is 1 if anything differs.
    """
    run.out, run.force = html, force
    run.require_destination(a, b)
    if _are_models(a, b):
        if html is not None:
            raise GraftError(
                "GC090", "--html shows graphs, but these folders contain only weights", hint="leave it out"
            )
        from graftc.cli.output import time_left
        from graftc.runtime.compare.folders import compare_folders

        weights = compare_folders(a, b, time_left(run.step, "comparing weights"))
        result = DiffResult(a=str(a), b=str(b), weights=weights)
    else:
        from graftc.runtime.artifact import open_artifact
        from graftc.runtime.artifact.compare import compare

        result = DiffResult(a=str(a), b=str(b), **vars(compare(open_artifact(a), open_artifact(b))))
        if html is not None:
            run.step("writing the page")
            _write_page(a, b, result, html, force)
    run.status = 0 if result.same else 1
    return result


@diff.shows
def _show(result: DiffResult, to: Console) -> None:
    if result.weights is not None:
        _print_weights(result.weights, to)
        return
    if result.same:
        to.print("no difference")
        return
    for name, lines in _sections(result).items():
        _print_section(name, lines, to)


def _are_models(a: Path, b: Path) -> bool:
    """Return whether the two folders contain models, rather than artifacts.

    Raises:
        GraftError: GC090 if one is a model and the other an artifact.
    """
    from graftc.runtime.artifact.places import is_artifact
    from graftc.runtime.compare.folders import is_model_folder

    ours = [is_artifact(path) and not is_model_folder(path) for path in (a, b)]
    models = [not own and (is_model_folder(path) or _has_config(path)) for own, path in zip(ours, (a, b), strict=True)]
    if any(ours) and any(models):
        one, other = (a, b) if ours[0] else (b, a)
        hint = f"merge it first, and compare the folders: graftc merge {one} --out DIR"
        raise GraftError("GC090", f"{one} is an artifact, but {other} is a model folder", hint=hint)
    return any(models)


def _has_config(path: Path) -> bool:
    return (path / "config.json").is_file()


def _write_page(a: Path, b: Path, result: DiffResult, html: Path, force: bool) -> None:
    from graftc.files.writing import write_text
    from graftc.runtime.artifact import open_artifact
    from graftc.runtime.view.contents import contents
    from graftc.runtime.view.evidence import evidence_of_artifact
    from graftc.runtime.view.page import page

    before, after = open_artifact(a), open_artifact(b)
    sections = _sections(result)
    sections["spec"] = [
        line for line in sections["spec"] if not line.startswith(("--- ", "+++ "))
    ]  # these lines contain local paths
    differences = [{"what": name, "lines": lines} for name, lines in sections.items() if lines]
    title = f"{before.path.name} and {after.path.name} compared"
    evidence = replace(evidence_of_artifact(after), differences=differences, title=title)
    write_text(html, page(contents(after.snapshot, evidence, before.snapshot)), force=force)


def _sections(result: DiffResult) -> dict[str, list[str]]:
    marks = [
        *(f"+ {p}" for p in result.sites.added),
        *(f"- {p}" for p in result.sites.removed),
        *(f"~ {p}" for p in result.sites.changed),
    ]
    signs = {"added": "+", "removed": "-", "changed": "~", "moved": "~"}
    tensors = [f"{signs[t.status]} {t.name} ({t.status}{_by(t.largest_difference)})" for t in result.tensors]
    return {
        "base": _capped([f"~ {difference}" for difference in result.base]),
        "spec": result.spec.splitlines(),
        "places": marks,
        "tensors": tensors,
        "graph (eval)": result.graph.splitlines(),
    }


def _by(largest: float | None) -> str:
    return "" if largest is None else f", by at most {largest:.3g}"


def _capped(lines: list[str], most: int = 5) -> list[str]:
    """Return the first lines and a count of the rest, since a different base differs everywhere."""
    return lines if len(lines) <= most + 1 else [*lines[:most], f"... and {len(lines) - most} more"]


def _print_weights(difference: WeightsDiff, to: Console) -> None:
    from graftc.runtime.compare.folders import lines, summary

    equal = f"{difference.equal} tensors are equal" if difference.equal != 1 else "1 tensor is equal"
    if difference.same:
        to.print(f"no difference: {equal}")
        return
    _print_section("tensors", list(lines(difference)), to)
    _print_section("likely causes", summary(difference), to, signs={})
    to.print(
        f"{len(difference.tensors)} of {len(difference.tensors) + difference.equal} tensors differ",
        soft_wrap=True,
        markup=False,
    )


def _print_section(title: str, lines: Sequence[str], to: Console, signs: Mapping[str, str] = _SIGNS) -> None:
    """Print lines below a title, coloured by their first characters; print nothing if there are no lines."""
    from graftc.cli.output import print_lines

    if lines:
        print_lines(to, [title], lambda _: "bold")
        print_lines(to, [f"  {line}" for line in lines], lambda line: signs.get(line[2:3], ""))
