"""``graftc inspect``: views of a rewritten graph. The base is not needed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graftc.cli.options import ArtifactArgument, Json

if TYPE_CHECKING:
    from rich.console import Console

    from graftc.compiler.inspect.snapshot import Snapshot
    from graftc.compiler.inspect.summary import Summary
    from graftc.runtime.artifact.read import Artifact

__all__ = ["inspect"]


class GraphMode(StrEnum):
    """Which of the two graphs."""

    TRAIN = "train"
    EVAL = "eval"


def inspect(
    directory: ArtifactArgument,
    graph: Annotated[bool, typer.Option("--graph", help="Print the rewritten graph.")] = False,
    diff: Annotated[
        bool, typer.Option("--diff", help="Print what changed; layers with equal changes are shown once.")
    ] = False,
    history: Annotated[bool, typer.Option("--history", help="Print what each pass did.")] = False,
    lowering: Annotated[
        bool,
        typer.Option("--lowering", help="Print which sites of the training graph are computed otherwise, and why not."),
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
            help="Write a page to look at the graph in a browser: before, after, step by step, with all figures.",
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
            help="A training log whose curves the page shows; by default one that lies beside the artifact.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
    json: Json = False,
) -> None:
    """Look at a rewritten graph: a summary, or what the options ask for. Needs no base model."""
    from graftc.cli.output import console, print_json, working

    with working(json) as warnings:
        from graftc.runtime.artifact import open_artifact

        given = {"graphml": graphml, "dot": dot, "html": html, "svg": svg, "png": png, "explorer": model_explorer}
        targets = {kind: path for kind, path in given.items() if path is not None}
        _check(directory, targets, force)
        artifact = open_artifact(directory)
        snapshot = artifact.snapshot
        wanted = {"graph": graph, "diff": diff, "history": history, "lowering": lowering, "tree": tree}
        wanted["explanation"] = explain is not None
        views = {name: view for name, view in _views(snapshot, mode.value, explain).items() if wanted[name]}
        shown = {name: make() for name, make in views.items()}
        files = _write(_writers(artifact, mode.value, log), targets, force) if targets else []
        if json or not (shown or files):
            from graftc.compiler.inspect.summary import summary

            shown["summary"] = _summary_view(str(directory), summary(snapshot))
    if json:
        from graftc.cli.results import InspectResult

        data = {name: shown[name].data if name in shown else None for name in ("summary", *wanted)}
        result = {"artifact": str(directory), "mode": mode.value, **data, "files": files, "warnings": warnings}
        print_json(InspectResult.model_validate(result))
        return
    to = console()
    for index, view in enumerate(shown.values()):
        if index:
            to.print()
        view.show(to)
    for file in files:
        to.print(f"wrote {file}", soft_wrap=True, markup=False)


@dataclass(frozen=True)
class _View:
    """One view, as JSON data and as a function that prints it."""

    data: Any
    show: Callable[[Console], None]


def _views(snapshot: Snapshot, mode: Any, name: str | None) -> dict[str, Callable[[], _View]]:
    """Return the functions that make each view; none is made yet."""
    return {
        "graph": lambda: _graph_view(snapshot, mode),
        "diff": lambda: _diff_view(snapshot, mode),
        "history": lambda: _history_view(snapshot, mode),
        "lowering": lambda: _lowering_view(snapshot),
        "tree": lambda: _tree_view(snapshot),
        "explanation": lambda: _explanation_view(snapshot, name or "", mode),
    }


def _graph_view(snapshot: Snapshot, mode: Any) -> _View:
    from graftc.passes.core.ir.graph_formats import graph_data
    from graftc.passes.core.ir.printer import format_program

    program = snapshot.program(mode)
    text = format_program(program)
    data = {"text": text, **graph_data(program)}
    return _View(data, lambda to: _lines(to, text, lambda line: "green" if "  # + " in line else ""))


def _diff_view(snapshot: Snapshot, mode: Any) -> _View:
    from graftc.compiler.inspect.diff import diff

    changes = diff(snapshot.program(mode, base=True), snapshot.program(mode))
    text = changes.text() or f"{mode}: nothing changed\n"
    colours = {"+": "green", "-": "red", "@": "cyan"}
    return _View(changes.to_json(), lambda to: _lines(to, text, lambda line: colours.get(line[:1], "")))


def _history_view(snapshot: Snapshot, mode: Any) -> _View:
    from graftc.compiler.inspect.history import history, history_columns

    rows = history(snapshot, mode, lowered=True)

    def show(to: Console) -> None:
        from graftc.cli.output import print_table

        columns, lines = history_columns(rows)
        print_table(to, columns, lines, right=("added", "removed", "nodes", "inserted", "seconds"))

    return _View([row.to_json() for row in rows], show)


def _lowering_view(snapshot: Snapshot) -> _View:
    from graftc.compiler.inspect.lowering import COLUMNS, lowering

    outcomes = lowering(snapshot)

    def show(to: Console) -> None:
        from graftc.cli.output import print_table

        print_table(to, COLUMNS, list(outcomes.rows()), right=("sites",))

    return _View(outcomes.to_json(), show)


def _tree_view(snapshot: Snapshot) -> _View:
    from graftc.compiler.inspect.tree import model_tree

    modules = model_tree(snapshot)
    mark = "  + "
    return _View(modules.to_json(), lambda to: _lines(to, modules.text(), lambda line: "green" if mark in line else ""))


def _explanation_view(snapshot: Snapshot, name: str, mode: Any) -> _View:
    from graftc.compiler.inspect.explain import explain

    explanation = explain(snapshot, name, mode)
    first = explanation.title
    return _View(
        explanation.to_json(), lambda to: _lines(to, explanation.text(), lambda line: "bold" if line == first else "")
    )


def _summary_view(directory: str, summary: Summary) -> _View:
    return _View(summary.to_json(), lambda to: _print_summary(to, directory, summary))


def _print_summary(to: Console, directory: str, summary: Summary) -> None:
    from graftc.cli.output import number, print_figures, print_table

    to.print(f"{directory}: {summary.model}, adapted", soft_wrap=True, markup=False)
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
    print_figures(summary.passes)
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


def _check(directory: Path, targets: dict[str, Path], force: bool) -> None:
    from graftc.files.writing import check_apart, check_destination

    for path in targets.values():
        check_apart(path, directory)
        check_destination(path, force=force)


def _write(writers: dict[str, Callable[[], str | bytes]], targets: dict[str, Path], force: bool) -> list[str]:
    """Make the contents of all files, then write them, and return their paths."""
    from graftc.files.writing import staged

    contents = [(path, writers[kind]()) for kind, path in targets.items()]
    for path, content in contents:
        with staged(path, force=force) as file:
            file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return [str(path) for path in targets.values()]


def _writers(artifact: Artifact, mode: Any, log: Path | None) -> dict[str, Callable[[], str | bytes]]:
    """Return the functions that make the content of each file; none is made yet."""
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
