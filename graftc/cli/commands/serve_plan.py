"""``graftc serve-plan``: state by which routes an engine can serve an artifact, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graftc.cli.command import CommandRun, command
from graftc.cli.serving_options import EngineOption, ServedBaseOption
from graftc.records.results import CommandResult
from graftc.records.serving.plans import ServingPlan, ServingRoute

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, kw_only=True)
class ServePlanResult(CommandResult, behind={"plan": ("warnings",)}):
    """`graftc serve-plan ARTIFACT --engine ENGINE --json`. The exit status is 1 if the engine has no route."""

    plan: ServingPlan
    """The routes."""


@command()
def serve_plan(
    run: CommandRun,
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="An artifact, or a PEFT folder.", show_default=False)
    ],
    engine: EngineOption,
    base: ServedBaseOption = None,
    error: Annotated[
        float, typer.Option("--error", metavar="X", help="The error of a LoRA that is not exact, at each site.")
    ] = 0.05,
    whole: Annotated[
        bool, typer.Option("--whole/--no-whole", help="Also try the routes that write a whole model.")
    ] = True,
) -> ServePlanResult:
    """State by which routes an engine can serve an artifact: as it is, as LoRA, merged, or in another engine."""
    from graftc.applications.serving.planning import serve_plan as plan

    found = plan(artifact, engine, base=base, error=error, merged=whole, step=run.step)
    run.status = 0 if any(route.available and route.engine == found.engine for route in found.routes) else 1
    return ServePlanResult(plan=found)


@serve_plan.shows
def _show(result: ServePlanResult, to: Console) -> None:
    plan = result.plan
    for number, route in enumerate(plan.routes):
        mark = "->" if number == plan.chosen else "  "
        other = "" if route.engine == plan.engine else f" in {route.engine}"
        what = _costs(route) if route.available else f"no: {route.reason}"
        to.print(f"{mark} {route.kind + other + ':':<26}{what}", soft_wrap=True, markup=False)
        for line in route.commands:
            to.print(f"{'':<8}{line}", soft_wrap=True, markup=False)
        if route.served is not None:
            over = "" if route.base is None else f" over the base {route.base}"
            to.print(f"{'':<8}then serve {route.served}{over}", soft_wrap=True, markup=False)
        if route.needs is not None:
            to.print(f"{'':<8}the engine needs: {route.needs}", soft_wrap=True, markup=False)
    to.print(f"{plan.artifact}, for {plan.read}", soft_wrap=True, markup=False)


def _costs(route: ServingRoute) -> str:
    facts = ["exact" if route.exact else "not exact", "unmerged" if route.unmerged else "over a new base"]
    if route.rank is not None:
        facts.append(f"rank {route.rank}")
    if route.site_error is not None and not route.exact:
        facts.append(f"{route.site_error:.1e} of a site's update")
    if route.output_error is not None:
        of = "" if route.largest_output is None else f" of {route.largest_output:.1e}"
        facts.append(f"outputs within {route.output_error:.1e}{of}")
    if route.bytes is not None:
        facts.append(f"{route.bytes:,} bytes")
    return ", ".join(facts)
