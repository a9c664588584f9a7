"""``graftc inspect``: show views of a rewritten graph. The base is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.options import ArtifactArgument
from graftc.records.explanation import Explanation
from graftc.records.fields import WRITTEN, ArtifactFolder
from graftc.records.graphs import (
    OUTCOME_COLUMNS,
    Diff,
    GraphRecord,
    HistoryRow,
    LoweringOutcome,
    history_columns,
    outcome_rows,
)
from graftc.records.results import CommandResult
from graftc.records.summary import Summary
from graftc.records.tree import TreeNode

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.runtime.artifact.read import Artifact


@dataclass(frozen=True, kw_only=True)
class InspectResult(CommandResult, behind={"files": ("warnings",)}):
    """`graftc inspect DIR --json`. What was not asked for is null."""

    artifact: ArtifactFolder

    mode: Literal["train", "eval"]
    """The mode of the graph."""

    summary: Summary
    """The adapted sites, and how much trains."""

    graph: GraphRecord | None
    """With `--graph`: the rewritten graph."""

    diff: Diff | None
    """With `--diff`: what changed from the base's graph."""

    history: tuple[HistoryRow, ...] | None
    """With `--history`: what every step did."""

    lowering: tuple[LoweringOutcome, ...] | None
    """With `--lowering`: what steps of lowering found in the training graph."""

    tree: TreeNode | None
    """With `--tree`: the model's modules with what was added to them."""

    explanation: Explanation | None
    """With `--explain`: why something is there."""

    files: Annotated[tuple[str, ...], WRITTEN]


class GraphMode(StrEnum):
    """The two graphs: in train mode and in eval mode."""

    TRAIN = "train"
    EVAL = "eval"


@command()
def inspect(
    run: CommandRun,
    directory: ArtifactArgument,
    graph: Annotated[bool, typer.Option("--graph", help="Print the rewritten graph.")] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print what changed; layers with equal changes are shown once.")
    ] = False,
    history: Annotated[bool, typer.Option("--history", help="Print what each pass did.")] = False,
    lowering: Annotated[
        bool,
        typer.Option(
            "--lowering", help="Print which sites of the training graph were lowered, and why others were not."
        ),
    ] = False,
    tree: Annotated[
        bool, typer.Option("--tree", help="Print the model's modules with what was added to them.")
    ] = False,
    explain: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="NAME",
            help="Explain where something comes from: a printed value, an fx node, a module, a site or a tensor.",
            show_default=False,
        ),
    ] = None,
    mode: Annotated[GraphMode, typer.Option("--mode", help="Which graph.")] = GraphMode.EVAL,
    graphml: Annotated[
        Path | None,
        typer.Option("--graphml", metavar="FILE", help="Write the graph as GraphML.", show_default=False),
    ] = None,
    dot: Annotated[
        Path | None,
        typer.Option("--dot", metavar="FILE", help="Write the graph for Graphviz.", show_default=False),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            metavar="FILE",
            help="Write a page for viewing the graph in a browser: before, after, step by step, with all figures.",
            show_default=False,
        ),
    ] = None,
    svg: Annotated[
        Path | None,
        typer.Option("--svg", metavar="FILE", help="Write a picture of what changed, as SVG.", show_default=False),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option("--png", metavar="FILE", help="Write a picture of what changed, as PNG.", show_default=False),
    ] = None,
    model_explorer: Annotated[
        Path | None,
        typer.Option(
            "--model-explorer", metavar="FILE", help="Write both graphs for Model Explorer.", show_default=False
        ),
    ] = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="A training log whose curves the page shows. Default: the log beside the artifact, if any.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite existing files.")] = False,
) -> InspectResult:
    """Show a rewritten graph: a summary, or the views that options select. The base model is not needed."""
    from graftc.compiler.inspect.diff import diff as diff_graphs
    from graftc.compiler.inspect.explain import explain as explain_name
    from graftc.compiler.inspect.history import history as history_of
    from graftc.compiler.inspect.lowering import lowering as lowering_of
    from graftc.compiler.inspect.summary import summary
    from graftc.compiler.inspect.tree import model_tree
    from graftc.passes.core.ir.graph_formats import graph_record
    from graftc.runtime.artifact import open_artifact

    given = {"graphml": graphml, "dot": dot, "html": html, "svg": svg, "png": png, "explorer": model_explorer}
    targets = {kind: path for kind, path in given.items() if path is not None}
    run.force = force
    for run.out in targets.values():
        run.require_destination(directory)
    artifact = open_artifact(directory)
    which: Any = mode.value
    snapshot = artifact.snapshot
    return InspectResult(
        artifact=str(directory),
        mode=which,
        summary=summary(snapshot),
        graph=graph_record(snapshot.program(which)) if graph else None,
        diff=diff_graphs(snapshot.program(which, base=True), snapshot.program(which)) if diff else None,
        history=history_of(snapshot, which, lowered=True) if history else None,
        lowering=lowering_of(snapshot).outcomes if lowering else None,
        tree=model_tree(snapshot) if tree else None,
        explanation=None if explain is None else explain_name(snapshot, explain, which),
        files=_written(artifact, which, log, targets, force),
    )


@inspect.shows
def _show(result: InspectResult, to: Console) -> None:
    from graftc.cli.output import print_table

    shows: list[Callable[[], None]] = []
    if (graph := result.graph) is not None:
        shows.append(lambda: _lines(to, graph.text, lambda line: "green" if "  # + " in line else ""))
    if (diff := result.diff) is not None:
        colours = {"+": "green", "-": "red", "@": "cyan"}
        text = diff.text() or f"{result.mode}: nothing changed\n"
        shows.append(lambda: _lines(to, text, lambda line: colours.get(line[:1], "")))
    if result.history is not None:
        columns, rows = history_columns(result.history)
        right = ("added", "removed", "nodes", "inserted", "seconds")
        shows.append(lambda: print_table(to, columns, rows, right=right))
    if (outcomes := result.lowering) is not None:
        shows.append(lambda: print_table(to, OUTCOME_COLUMNS, list(outcome_rows(outcomes)), right=("sites",)))
    if (tree := result.tree) is not None:
        shows.append(lambda: _lines(to, tree.text(), lambda line: "green" if "  + " in line else ""))
    if (explanation := result.explanation) is not None:
        shows.append(lambda: _lines(to, explanation.text(), lambda line: "bold" if line == explanation.title else ""))
    if not (shows or result.files):
        shows.append(lambda: _print_summary(to, result))
    for index, show in enumerate(shows):
        if index:
            to.print()
        show()
    for file in result.files:
        to.print(f"wrote {file}", soft_wrap=True, markup=False)


def _print_summary(to: Console, result: InspectResult) -> None:
    from graftc.cli.output import number, print_figures, print_table

    summary = result.summary
    to.print(f"{result.artifact}: {summary.model}, adapted", soft_wrap=True, markup=False)
    to.print()
    columns = ("adaptation", "method", "roles", "layers", "places", "trainable", "frozen", "tensors", "nodes")
    rows = [
        (
            a.name,
            a.method,
            ", ".join(a.roles),
            a.layers,
            *(number(n) for n in (a.places, a.trainable_parameters, a.frozen_parameters, a.tensors, a.nodes)),
        )
        for a in summary.adaptations
    ]
    print_table(to, columns, rows, right=columns[4:])
    to.print()
    print_figures(summary.passes, to)
    facts = [
        (
            "trainable parameters",
            f"{number(summary.trainable_parameters)} ({summary.percent:.3f} % of base plus added)",
        ),
        *([("trained in full", number(summary.trained_in_full))] if summary.trained_in_full else []),
        ("base parameters", f"{number(summary.base_parameters)} in {number(summary.base_tensors)} tensors"),
        ("nodes of the eval graph", f"{number(summary.nodes)}, {number(summary.inserted)} of them inserted"),
    ]
    for label, fact in facts:
        to.print(f"{label + ':':<25}{fact}", soft_wrap=True, markup=False)


def _lines(to: Console, text: str, style: Callable[[str], str]) -> None:
    from graftc.cli.output import print_lines

    print_lines(to, text.splitlines(), style)


def _written(
    artifact: Artifact, mode: Any, log: Path | None, targets: Mapping[str, Path], force: bool
) -> tuple[str, ...]:
    """Create the contents of all files, then write the files, and return their paths."""
    if not targets:
        return ()
    from graftc.files.writing import staged

    writers = _writers(artifact, mode, log)
    contents = [(path, writers[kind]()) for kind, path in targets.items()]
    for path, content in contents:
        with staged(path, force=force) as file:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return tuple(map(str, targets.values()))


def _writers(artifact: Artifact, mode: Any, log: Path | None) -> dict[str, Callable[[], str | bytes]]:
    """Return, for each kind of file, a function that creates its contents when called."""
    from graftc.compiler.inspect.model_explorer import model_explorer_text
    from graftc.passes.core.ir.graph_formats import dot_text, graphml_text
    from graftc.runtime.view.contents import contents
    from graftc.runtime.view.evidence import evidence_of_artifact
    from graftc.runtime.view.view import ModelView

    snapshot = artifact.snapshot
    view = ModelView(lambda: contents(snapshot, evidence_of_artifact(artifact, log)))
    return {
        "graphml": lambda: graphml_text(snapshot.program(mode)),
        "dot": lambda: dot_text(snapshot.program(mode)),
        "html": lambda: view.html,
        "svg": lambda: view.svg(mode),
        "png": lambda: view.png(mode),
        "explorer": lambda: model_explorer_text(snapshot, mode),
    }
