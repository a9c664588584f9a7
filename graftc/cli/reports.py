"""The report on a spec and a model that several commands print."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from annotated_types import Ge

from graftc.records.fields import GivenSpec, ModelClass, Warnings
from graftc.records.report import Report, StackReport, Totals
from graftc.specs.records.record import stated

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class CheckedReport(Report, published="CheckedData", behind={"class_": ("totals",)}):
    """The report of `check` and `compile` on a spec and a model."""

    spec: GivenSpec

    model: str
    """The `--model` option."""

    class_: ModelClass

    load_seconds: Annotated[float, Ge(0)]
    """How long loading the model took."""

    warnings: Warnings = ()

    @stated
    def totals(self) -> Totals:
        """Sums over all adaptations, the `train:` list included."""
        names = (field.name for field in fields(Totals))
        return Totals(**{name: sum(getattr(entry, name) for entry in self.adaptations) for name in names})


def checked(report: Report, spec: Path, model: str, loaded: object, seconds: float) -> dict[str, Any]:
    """Return the fields of a `CheckedReport`."""
    counted = {each.name: getattr(report, each.name) for each in fields(Report)}
    return {**counted, "spec": str(spec), "model": model, "class_": type(loaded).__name__, "load_seconds": seconds}


def print_report(report: CheckedReport, to: Console) -> None:
    """Print the report on what a spec adds to a model."""
    from graftc.cli.output import number, print_figures, print_table

    columns = ("adaptation", "method", "sites", "trainable", "frozen", "bytes", "FLOPs per token")
    rows: list[tuple[str, ...]] = [
        (
            entry.name,
            entry.method,
            *(number(entry.sites), number(entry.trainable_parameters), number(entry.frozen_parameters)),
            *(number(entry.bytes), number(entry.flops_per_token)),
        )
        for entry in report.adaptations
    ]
    if len(rows) > 1:
        rows.append(("total", "", *(number(value) for value in report.totals.to_json().values())))
    to.print(f"{report.spec} fits {report.class_}", soft_wrap=True)
    to.print()
    print_table(to, columns, rows, right=columns[2:])
    to.print()
    print_figures(report.passes, to)
    print_stacks(report.stacks, to)
    facts = [
        ("trainable parameters", f"{number(report.trainable_parameters)} ({report.percent:.3f} % of base plus added)"),
        ("trained in full", number(report.trained_in_full)) if report.trained_in_full else None,
        ("deployed parameters", number(report.deployed_parameters)),
        ("base parameters", number(report.base_parameters)),
        ("base FLOPs per token", number(report.flops_per_token)),
        *(("note", note) for note in report.notes),
        ("seconds", _seconds(report)),
    ]
    for fact in facts:
        if fact is not None:
            to.print(f"{fact[0] + ':':<22}{fact[1]}", soft_wrap=True, markup=False)


def print_stacks(stacks: Sequence[StackReport], to: Console) -> None:
    """Print how much of each stack was captured as a graph, unless the whole model was."""
    from graftc.cli.output import number, print_table

    if all(each.level == "graph" for each in stacks):
        return
    rows = [(each.stack, number(each.layers), number(each.parameters), each.level, each.reason) for each in stacks]
    print_table(to, ("stack", "layers", "parameters", "graphs", "in the way"), rows, right=("layers", "parameters"))
    to.print()


def _seconds(report: CheckedReport) -> str:
    captured = "cached capture" if report.cached else "capture"
    times = f"{captured} {report.capture_seconds:.1f}, rewrite {report.rewrite_seconds:.1f}"
    return f"load {report.load_seconds:.1f}, {times}"
