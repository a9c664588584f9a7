"""The steps of lowering a training Program, in order, each of which can be turned off by its name."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from graftc.passes.core.ir.history import Recorder
from graftc.passes.core.ir.program import Program
from graftc.passes.lowering.outcome import LoweringOutcome
from graftc.passes.lowering.projections import fuse_projections
from graftc.specs.options.optimise import LoweringName

__all__ = ["STEPS", "Lowering", "LoweringOutcome", "lower"]

Lowering = Callable[[Program], list[LoweringOutcome]]
"""Rewrites a Program in place."""

STEPS: Mapping[LoweringName, Lowering] = {"projections": fuse_projections}
"""By name, in order."""


def lower(
    program: Program, off: Collection[str] = (), first: Mapping[str, Lowering] = MappingProxyType({})
) -> tuple[Program, list[LoweringOutcome]]:
    """A copy of a training Program as it is run, and what each step did to it.

    Args:
        program: stays as it is.
        off: names of steps to leave out.
        first: steps by name that the spec asks for, which come before the others.
    """
    lowered, outcomes = program.copy(), []
    recorder = Recorder(lowered.graph)
    for name, step in (*first.items(), *STEPS.items()):
        if name in off:
            continue
        started = time.perf_counter()
        outcomes += step(lowered)
        lowered.history.append(recorder.entry(f"lower({name})", lowered.graph, time.perf_counter() - started))
    return lowered, outcomes
