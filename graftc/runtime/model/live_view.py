"""A compiled model as its own Python between graphs of its layers, whatever its graphs are: for ``generate`` of classes
whose calls with a cache are no calls of one graph, such as those that read images with the first tokens only."""

from __future__ import annotations

import copy
from dataclasses import replace

from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.passes.core.elements.calls import elements_in
from graftc.runtime.live.live_root import LiveRoot
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.root import AdaptedView

_KNOWN = "live view"


def live_view(runner: ModelRunner) -> ModelRunner:
    """A Runner of the same module that calls graphs of layers; it is made once.

    Raises:
        GraftError: GC030 where no layer and no map is a graph, GC149 for what acts on a whole call.
    """
    shown = runner.shown
    known = runner.derived.get(_KNOWN)
    if known is None or known[0] is not shown:
        own = shown.compilation
        values = dict(adapter_values(own.store))
        start = StartingPoint(own.seed, own.use_cache, values, own.captures(), level="layers")
        made = compile_model(own.spec, own.source, own.main.axes, flags=own.flags, start=start)
        view = AdaptedView(replace(made, store=runner.store), {}, f"{shown.label}live: ", shown.off, shown.steering)
        known = runner.derived[_KNOWN] = shown, view, LiveRoot(own.source, elements_in(made.flags))
    beside = copy.copy(runner)
    _, beside.shown, beside.live = known
    return beside
