"""The plans of `graftc serve-plan`: the ways in which an engine can serve an artifact, the cheapest exact one first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.records.fields import NeededOption
from graftc.specs.records.record import Record, stated

RouteKind = Literal["as-is", "lora", "lora-over-base", "lora-within-error", "graph", "merged"]
"""The form that is served: the adapter as it is; a LoRA that computes the same; one over a base into which the rest was
folded; a LoRA with an error; the model with its adaptations in a graph; the model with everything folded."""


@dataclass(frozen=True)
class ServingRoute(Record):
    """One way in which an engine can serve an artifact, tried on the artifact itself."""

    kind: RouteKind
    """The form that is served."""

    engine: str
    """The engine that serves it."""

    available: bool
    """Whether the files could be made, and the engine reads all of them as they are meant."""

    exact: bool
    """Whether it computes what the artifact computes, up to rounding."""

    unmerged: bool
    """Whether the base stays as it is, so that the engine can serve other adapters beside this one."""

    reason: str
    """Why it is not available, or what else is not exact; empty otherwise."""

    rank: Annotated[int, Ge(1)] | None = None
    """The largest rank that the engine has to accept; null without a LoRA."""

    site_error: Annotated[float, Ge(0)] | None = None
    """The error of the worst site's update, relative to it; null if no update was computed anew."""

    output_error: Annotated[float, Ge(0)] | None = None
    """The largest absolute difference from the artifact in any output, on random inputs; null if not measured."""

    largest_output: Annotated[float, Ge(0)] | None = None
    """The largest absolute number among these outputs; null if not measured."""

    bytes: Annotated[int, Ge(0)] | None = None
    """The size of the files that have to be made; null if none could be, or none have to be."""

    commands: tuple[str, ...] = ()
    """The commands to run, in order; empty if the folder is served as it is, or cannot be served."""

    served: str | None = None
    """The file or folder that the engine loads, which the commands make; null if the route is not available."""

    base: str | None = None
    """The folder of the base over which the engine loads it, if the commands make one; null for the artifact's own."""

    needs: NeededOption = None


@dataclass(frozen=True)
class ServingPlan(Record):
    """The routes by which an artifact can be served, for one engine and by others that serve it unmerged."""

    artifact: str
    """The artifact, or the PEFT folder."""

    engine: str
    """The engine that was asked for."""

    read: str
    """That engine with the version, or the commit, whose source the statements follow."""

    routes: tuple[ServingRoute, ...]
    """Every route, exact ones before others and cheap ones before costly ones; those of other engines come last."""

    @stated
    def chosen(self) -> int | None:
        """The number of the route to take, counted from 0: the first exact one, or else the first one; null if none."""
        usable = [number for number, route in enumerate(self.routes) if route.available]
        return next((number for number in usable if self.routes[number].exact), next(iter(usable), None))
