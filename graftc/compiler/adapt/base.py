"""Capture the Program to adapt, verify it, and compare it with the source model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from graftc.compiler.adapt.context import Work
from graftc.compiler.capture.anchor import Anchor, anchor
from graftc.compiler.capture.as_captured import random_structure
from graftc.compiler.capture.capture import Capture
from graftc.compiler.capture.capture import capture as capture_model
from graftc.compiler.capture.capture_cache import forget, keep
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.capture.untraced import unkept
from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import is_live
from graftc.compiler.live.kinds import captured_by_kinds
from graftc.passes.core import progress
from graftc.passes.core.ir.effects import flaw
from graftc.passes.core.ir.program import Program, from_two
from graftc.passes.core.ir.verify import record_baseline
from graftc.passes.core.pipeline import Log, Pass, Pipeline
from graftc.passes.graph.gather_early import gather_early
from graftc.specs.errors.diagnostics import GraftError, first_line, warn


def _gather(program: Program, compilation: Compilation) -> Program:
    return record_baseline(gather_early(program))


GATHER: Pipeline[Compilation] = Pipeline("gather", [Pass("gather early", _gather, verified=True)])
"""For a cloze: select the positions that are read, so that the head does not compute all positions."""


def take(work: Work, request: CaptureRequest, log: Log) -> Capture:
    """Return the source model's graph, verified and compared with the model.

    Raises:
        GraftError: GC041 if they differ.
    """
    compilation = work.compilation
    capture = captured_by_kinds(request, compilation.known, use_cache=compilation.use_cache)
    from_cache = capture.cached
    try:
        capture = _checked(compilation, capture, log, request.axes)
    except Exception as error:
        if not from_cache and not capture.alike:  # neither a cached graph nor shared layers can be at fault
            raise
        capture = _every_layer(compilation, capture, request, log)
        if from_cache:
            capture.notes += (f"the cached graph of this model was captured again: {first_line(error)}",)
    _note(work, capture)
    if compilation.spec.cloze is not None:
        capture = replace(capture, traced=capture.program)
        GATHER.run(capture.traced, compilation, log)
    for name in sorted(capture.traced.updates):
        compilation.store.own(name, work.initial.values.get(name))
    return capture


def _every_layer(compilation: Compilation, stale: Capture, request: CaptureRequest, log: Log) -> Capture:
    """Capture again with every layer traced, and replace the cached capture."""
    if is_live(compilation.model):
        fresh = captured_by_kinds(request, {}, use_cache=False, alike=False)
        return _checked(compilation, fresh, log, request.axes)
    if compilation.use_cache:
        forget(request)
    fresh = _checked(compilation, replace(capture_model(request, alike=False), key=stale.key), log, request.axes)
    if compilation.use_cache:
        keep(request, fresh)
    return fresh


def _checked(compilation: Compilation, capture: Capture, log: Log, shown: Sequence[Axis] = ()) -> Capture:
    """Return a capture with its anchor.

    Raises:
        GraftError: GC030 for a write that is not allowed, GC040 if the graph does not fit the Store's tensors, GC041 if
            it does not match the model.
    """
    store, program = compilation.store, record_baseline(capture.traced)
    log.entries = list(program.history)
    added = [name for name in capture.constants if name not in store]
    for name in added:
        store.add_constant(name, capture.constants[name])
    try:
        write = flaw(program.graph, program.mode, store.is_buffer)
        if write is not None:
            message = f"{type(compilation.source).__name__} cannot be adapted: at {write[0].name} {write[1]}"
            raise GraftError("GC030", message, hint="a forward may only change buffers, and only in train mode")
        log.verified(program, store, "canonicalise")
        comparison = anchored(compilation, capture, program, shown)
        untried = ("it was not compared on all kinds of inputs",) if comparison.plain else ()
        differing = comparison.differing or untried
        if differing and (comparison.differing or capture.cached):
            where = f"{comparison.mode} mode with {comparison.inputs}"
            message = f"the graph of {type(compilation.model).__name__} is not its model: in {where}, {differing[0]}"
            raise GraftError("GC041", message, hint=_NOT_THE_MODEL, details=differing[1:5])
        if is_live(compilation.model) and comparison.difference is None:  # each layer ran by itself when it was chosen
            name, why = type(compilation.model).__name__, comparison.skipped
            message = f"the layers of {name} could not be compared with their graphs: {why}"
            raise GraftError("GC041", message, hint=_NOT_THE_MODEL)
    except Exception:
        for name in added:
            store.drop_constant(name)
        raise
    program.inputs = from_two(program.inputs, comparison.from_two)
    return replace(capture, anchor=comparison, flat=None)


def anchored(compilation: Compilation, capture: Capture, program: Program, shown: Sequence[Axis] = ()) -> Anchor:
    """Return the comparison of a graph, captured or derived from a capture, with the source model.

    Args:
        compilation: the Compilation with the model.
        capture: the capture.
        program: the graph.
        shown: the requested inputs. Inputs that are captured as shown are also compared as shown; the others are used
            for a model that takes no samples.
    """
    progress.step(f"anchor({program.mode})")
    request = CaptureRequest.served_by(program, compilation.model, shown, compilation.store.aliases)
    return anchor(request, program, capture.constants)


_NOT_THE_MODEL = "a graph has no decisions that depend on values, and no state outside of tensors and buffers"


def _note(work: Work, capture: Capture) -> None:
    """Record and warn about each part of the model that its graph lacks, once."""
    compilation = work.compilation
    known = {*compilation.notes, *work.notes}
    assigned = [*capture.assigned, *(capture.anchor.assigned if capture.anchor is not None else ())]
    written = [f"forward assigns to {name}" for name in assigned]
    drawn = random_structure(compilation.model)
    lost = unkept(compilation.model)
    new = [note for note in dict.fromkeys([*capture.notes, *drawn, *written, *lost]) if note not in known]
    work.notes += new
    for note in new:
        if note in written:
            hint = "the value read there is a constant of the graph; store changing values in buffers, or return them"
            warn("GC042", f"{type(compilation.model).__name__}'s {note}, which its graph does not", hint=hint)
        elif note in lost:
            warn("GC049", note, hint="its graph has the gradients and the state seen during capture")
        elif note in drawn:
            warn("GC047", note, hint="set it to the intended value before compiling")
