"""``graftc check``: resolve a spec and compute its cost without writing anything."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftc.cli.command import CommandRun, command
from graftc.cli.memory import (
    Accumulate,
    BaseDType,
    Batch,
    Checkpoint,
    Device,
    Devices,
    Memory,
    MemoryBudget,
    Methods,
    Optimizer,
    PlanningOptions,
    Tokens,
    plan_memory,
    print_memory,
)
from graftc.cli.options import Meta, ModelOption, SpecArgument
from graftc.cli.reports import CheckedReport, checked, print_report
from graftc.records.applications.memory import PlannedMemory

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class CheckResult(CheckedReport):
    """`graftc check SPEC --model MODEL --json`."""

    memory: PlannedMemory | None
    """With `--memory`, what training takes; null otherwise."""


@command()
def check(
    run: CommandRun,
    spec: SpecArgument,
    model: ModelOption,
    meta: Meta = False,
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
) -> CheckResult:
    """Resolve a spec against a model and report what it adds, without writing anything; plan training memory."""
    options = {"dtype": dtype, "checkpoint": checkpoint, "optimizer": optimizer, "devices": devices}
    options |= {"device": device, "accumulate": accumulate}
    planning = PlanningOptions(batch, seq, memory_budget, methods, options)
    from graftc.specs.io import early_spec

    # Parse before torch is imported, so that a misspelt field is reported at once.
    early = early_spec(spec)

    from graftc.runtime.api import check as check_spec
    from graftc.runtime.api import spec_for
    from graftc.runtime.sources.models import load_model_and_inputs

    started = time.perf_counter()
    run.step("loading the model")
    loaded, inputs = load_model_and_inputs(model, meta=meta)
    seconds = time.perf_counter() - started
    loaded_spec = spec_for(early, loaded, inputs)
    run.step("compiling")
    report = check_spec(loaded_spec, loaded, inputs)
    planned = None
    if memory or memory_budget is not None or methods is not None:
        planned = plan_memory(loaded_spec, loaded, inputs, planning, run.step)
    if planned is not None and planned.plan.fits is False:
        run.status = 1
    return CheckResult(**checked(report, spec, model, loaded, seconds), memory=planned)


@check.shows
def _show(result: CheckResult, to: Console) -> None:
    print_report(result, to)
    if result.memory is not None:
        print_memory(result.memory, to)
