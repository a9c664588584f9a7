"""``graftc check --memory``: the memory that a training step takes, and the sizes that fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, TypeAlias

import typer

from graftc.records.applications.memory import PlannedMemory
from graftc.specs.errors.text import size_text

if TYPE_CHECKING:
    from rich.console import Console


_PANEL = "Memory of a training step"


class BaseType(StrEnum):
    """The dtypes that ``--dtype`` accepts for a base."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


Memory: TypeAlias = Annotated[
    bool, typer.Option("--memory", help="Compute the memory that a training step takes.", rich_help_panel=_PANEL)
]
Batch: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--batch",
        metavar="N",
        min=1,
        help="Rows on each device. Default: 1.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Tokens: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--seq",
        metavar="N",
        min=1,
        help="Tokens in each row; required by models that take sequences.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
BaseDType: TypeAlias = Annotated[
    BaseType | None,
    typer.Option("--dtype", help="Dtype of the base. Default: its own.", show_default=False, rich_help_panel=_PANEL),
]
Checkpoint: TypeAlias = Annotated[
    bool | None,
    typer.Option(
        "--checkpoint/--no-checkpoint",
        help="Recompute layers in the backward pass. Default: as in the spec.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Optimizer: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--optimizer",
        metavar="NAME",
        help="adamw, sgd, sgd-momentum, adafactor, adamw8bit, aged-adamw or sm3. Default: adamw, or SpIEL's own.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Devices: TypeAlias = Annotated[
    int | None,
    typer.Option(
        "--devices",
        metavar="N",
        min=1,
        help="Number of devices that share the model by FSDP2. Default: 1.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Device: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="KIND",
        help="Device type: cuda, cpu, ... Default: cuda.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Accumulate: TypeAlias = Annotated[
    bool,
    typer.Option("--accumulate", help="Assume that gradients from other micro-batches exist.", rich_help_panel=_PANEL),
]
MemoryBudget: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--memory-budget",
        metavar="SIZE",
        help="Memory of each device, such as 24GB: find the largest batch and sequence that fit. Implies --memory.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Methods: TypeAlias = Annotated[
    str | None,
    typer.Option(
        "--methods",
        metavar="NAMES",
        help="Add a table of other methods: lora,ia3,full:GLOB,..., or usual. Implies --memory.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]


@dataclass(frozen=True)
class PlanningOptions:
    """The planning options of a command.

    Attributes:
        batch, sequence: the size of a step.
        budget: the budget as written by the user.
        methods: the methods as written by the user.
        options: the other options, as for `graftc.plan`.
    """

    batch: int
    sequence: int | None
    budget: str | None
    methods: str | None
    options: Mapping[str, Any]


def plan_memory(
    spec: Any, model: Any, inputs: Any, given: PlanningOptions, told: Callable[[str], None]
) -> PlannedMemory:
    """Plan the memory for a spec, and for other methods if they are requested."""
    from graftc.applications.planner.planning import fitted, workbench
    from graftc.applications.planner.sizes import bytes_of
    from graftc.applications.planner.table import USUAL, Size, rows, specs_of

    budget = None if given.budget is None else bytes_of(given.budget)
    named = [name.strip() for name in (given.methods or "").split(",") if name.strip()]
    others = specs_of(USUAL if named == ["usual"] else named, spec)
    told("planning")
    bench = workbench(spec, model, inputs, **given.options)
    plan = bench.plan(given.batch, given.sequence)
    if budget is not None:
        plan = fitted(bench, plan, budget) if not others else bench.fitted(plan, budget)
    options = {name: value for name, value in given.options.items() if name not in ("checkpoint", "optimizer")}
    size = Size(given.batch, given.sequence, budget)
    return PlannedMemory(plan, tuple(rows(others, model, inputs, size, told, **options)))


def print_memory(planned: PlannedMemory, to: Console) -> None:
    """Print the plan and the table."""
    from graftc.cli.output import print_table

    to.print()
    to.print(str(planned.plan), soft_wrap=True, markup=False)
    if not planned.table:
        return
    to.print()
    bounded = planned.plan.budget is not None
    columns = ["method", "base", "checkpointing", "loss", "optimizer", "peak"]
    columns += ["fits", "largest batch", "longest sequence"] if bounded else []
    lines = []
    for row in planned.table:
        line = [row.method, row.quantize or "as it is", "yes" if row.checkpoint else "no"]
        line += ["chunked" if row.chunked else "whole"]
        if row.plan is None:
            lines.append([*line, row.reason, *[""] * (len(columns) - 5)])
            continue
        line += [row.plan.optimizer, size_text(row.plan.peak)]
        if bounded:
            longest = row.plan.largest_sequence
            line += ["yes" if row.plan.fits else "no", str(row.plan.largest_batch)]
            line += ["" if longest is None else str(longest)]
        lines.append(line)
    print_table(to, columns, lines, right=columns[5:])
