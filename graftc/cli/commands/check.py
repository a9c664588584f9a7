"""``graftc check``: resolve a spec and compute its cost without writing anything."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

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
    batch: Batch = None,
    seq: Tokens = None,
    dtype: BaseDType = None,
    checkpoint: Checkpoint = None,
    optimizer: Optimizer = None,
    devices: Devices = None,
    device: Device = None,
    accumulate: Accumulate = False,
    memory_budget: MemoryBudget = None,
    methods: Methods = None,
) -> CheckResult:
    """Resolve a spec against a model and report what it adds, without writing anything; plan training memory."""
    options: dict[str, Any] = {"dtype": dtype, "checkpoint": checkpoint, "optimizer": optimizer, "devices": devices}
    options |= {"device": device, "accumulate": accumulate}
    plans = memory or memory_budget is not None or methods is not None
    if not plans:
        _require_none({"batch": batch, "seq": seq, **options, "accumulate": accumulate or None})
    options |= {"devices": devices or 1, "device": device or "cuda"}
    planning = PlanningOptions(batch or 1, seq, memory_budget, methods, options)
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
    if plans:
        planned = plan_memory(loaded_spec, loaded, inputs, planning, run.step)
    if planned is not None and planned.plan.fits is False:
        run.status = 1
    return CheckResult(**checked(report, spec, model, loaded, seconds), memory=planned)


def _require_none(options: Mapping[str, Any]) -> None:
    """Check that no option concerns a plan of the memory. ``options`` are values by name.

    Raises:
        GraftError: GC090 for such an option.
    """
    from graftc.specs.errors.diagnostics import GraftError

    for name in (name for name, value in options.items() if value is not None):
        message = f"--{name} concerns the memory of a training step, which is not computed"
        raise GraftError("GC090", message, hint=f"add --memory, or leave out --{name}")


@check.shows
def _show(result: CheckResult, to: Console) -> None:
    print_report(result, to)
    if result.memory is not None:
        print_memory(result.memory, to)
