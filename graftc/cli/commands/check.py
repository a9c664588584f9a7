"""``graftc check``: resolve and cost a spec without writing anything."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import typer

from graftc.cli.memory import (
    Accumulate,
    Asked,
    BaseDType,
    Batch,
    Checkpoint,
    Device,
    Devices,
    Memory,
    MemoryBudget,
    Methods,
    Optimizer,
    Tokens,
    plan_memory,
    print_memory,
)
from graftc.cli.options import Json, Meta, ModelOption, SpecArgument

if TYPE_CHECKING:
    from graftc.compiler.inspect.report import Report
    from graftc.compiler.inspect.stacks import StackReport

__all__ = ["check", "print_report", "totals"]


def check(
    spec: SpecArgument,
    model: ModelOption,
    meta: Meta = False,
    json: Json = False,
    memory: Memory = False,
    batch: Batch = 1,
    seq: Tokens = None,
    dtype: BaseDType = None,
    checkpoint: Checkpoint = None,
    optimizer: Optimizer = None,
    devices: Devices = 1,
    device: Device = "cuda",
    accumulate: Accumulate = False,
    memory_budget: MemoryBudget = None,
    methods: Methods = None,
) -> None:
    """Resolve a spec against a model and count what it adds, without writing anything; work out what training takes."""
    options = {"dtype": dtype, "checkpoint": checkpoint, "optimizer": optimizer, "devices": devices}
    options |= {"device": device, "accumulate": accumulate}
    asked = Asked(batch, seq, memory_budget, methods, options)
    wanted = memory or memory_budget is not None or methods is not None
    from graftc.cli.output import print_json, steps, working
    from graftc.specs.io import early_spec

    with working(json) as warnings, steps(json) as step:
        # Before torch is imported: a misspelt field should be reported at once.
        early = early_spec(spec)

        from graftc.runtime.api import check as check_spec
        from graftc.runtime.api import spec_for
        from graftc.runtime.sources.models import load_model_and_inputs

        started = time.perf_counter()
        step("loading the model")
        loaded, inputs = load_model_and_inputs(model, meta=meta)
        seconds = time.perf_counter() - started
        loaded_spec = spec_for(early, loaded, inputs)
        step("compiling")
        report = check_spec(loaded_spec, loaded, inputs)
        planned = plan_memory(loaded_spec, loaded, inputs, asked, step) if wanted else None
    if json:
        from graftc.cli.results import CheckResult

        places = {"spec": str(spec), "model": model, "class": type(loaded).__name__}
        data = {**report.to_json(), "totals": totals(report), "load_seconds": seconds, "warnings": warnings}
        data["memory"] = None if planned is None else planned.to_json()
        print_json(CheckResult.model_validate({**places, **data}))
    else:
        print_report(str(spec), type(loaded).__name__, report, seconds)
        if planned is not None:
            print_memory(planned)
    if planned is not None and planned.plan.fits is False:
        raise typer.Exit(1)


def totals(report: Report) -> dict[str, Any]:
    """Return the sums over the adaptations, including the ``train:`` list."""
    keys = ("sites", "trainable_parameters", "frozen_parameters", "bytes", "flops_per_token")
    return {key: sum(getattr(entry, key) for entry in report.adaptations) for key in keys}


def print_report(spec: str, name: str, report: Report, load_seconds: float) -> None:
    """Print what a spec adds to a model."""
    from graftc.cli.output import console, number, print_figures, print_table

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
    sums = totals(report)
    if len(rows) > 1:
        rows.append(("total", "", *(number(value) for value in sums.values())))
    to = console()
    to.print(f"{spec} fits {name}", soft_wrap=True)
    to.print()
    print_table(to, columns, rows, right=columns[2:])
    to.print()
    print_figures(report.passes)
    print_stacks(report.stacks)
    facts = [
        ("trainable parameters", f"{number(report.trainable_parameters)} ({report.percent:.3f} % of base plus added)"),
        ("trained in full", number(report.trained_in_full)) if report.trained_in_full else None,
        ("deployed parameters", number(report.deployed_parameters)),
        ("base parameters", number(report.base_parameters)),
        ("base FLOPs per token", number(report.flops_per_token)),
        *(("note", note) for note in report.notes),
        ("seconds", _seconds(report, load_seconds)),
    ]
    for fact in facts:
        if fact is not None:
            to.print(f"{fact[0] + ':':<22}{fact[1]}", soft_wrap=True, markup=False)


def print_stacks(stacks: Sequence[StackReport]) -> None:
    """Print how much of each stack is a graph, unless the whole model is one."""
    from graftc.cli.output import console, number, print_table

    if all(each.level == "graph" for each in stacks):
        return
    rows = [(each.stack, number(each.layers), number(each.parameters), each.level, each.reason) for each in stacks]
    print_table(
        console(), ("stack", "layers", "parameters", "graphs", "in the way"), rows, right=("layers", "parameters")
    )
    console().print()


def _seconds(report: Report, load: float) -> str:
    captured = "cached capture" if report.cached else "capture"
    return f"load {load:.1f}, {captured} {report.capture_seconds:.1f}, rewrite {report.rewrite_seconds:.1f}"
