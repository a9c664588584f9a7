"""A view of any compiled model that runs the source's own Python between layer graphs.

``generate`` uses it for classes whose calls with a cache do not fit one graph, such as those that read images only with
the first tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.compiler.preparing import Level
from graftc.runtime.live.live_root import LiveRoot
from graftc.runtime.model.model_runner import ModelRunner
from graftc.runtime.model.root import AdaptedView
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.target import Target

_KNOWN, _MAPS = "live view", "live view of maps"


def live_view(runner: ModelRunner, shown_by: Callable[[nn.Module], Any] | None = None) -> ModelRunner:
    """Return a Runner of the same module that calls layer graphs, which are created once.

    Args:
        runner: the Runner of a model that is one graph.
        shown_by: a function that calls the model, to observe how the model calls its maps; if given, each graph is a
            single map instead of a layer.

    Raises:
        GraftError: GC030 if no layer or map can become a graph, GC031 if an adapted place is in none of them, GC149
            for an adaptation that acts on an entire call.
    """
    shown = runner.shown
    name = _KNOWN if shown_by is None else _MAPS
    known = runner.derived.get(name)
    if known is None or known[0] is not shown:
        own = shown.compilation
        compilation = _taken_apart(own, shown_by)
        view = AdaptedView(
            replace(compilation, store=runner.store), {}, f"{shown.label}live: ", shown.off, shown.steering
        )
        known = runner.derived[name] = (
            shown,
            view,
            LiveRoot.of(compilation, runner.store),
        )
    beside = copy.copy(runner)
    _, beside.shown, beside.live = known
    return beside


def _taken_apart(own: Compilation, shown_by: Callable[[nn.Module], Any] | None) -> Compilation:
    """Return a Compilation of a model's layers, adapted at the same places."""
    values, wanted = dict(adapter_values(own.store)), _places(own)
    level: Level = "layers" if shown_by is None else "modules"
    start = StartingPoint(
        own.seed, own.use_cache, values, own.captures(), level=level, requantised=own.requantised, shown=shown_by
    )
    for spec in (own.spec, _by_names(own.spec, wanted)):  # roles are unknown if single maps are graphs
        try:
            compiled = compile_model(spec, own.source, own.main.axes, flags=own.flags, start=start)
        except GraftError as error:
            if spec is not own.spec or error.code not in _NOT_THERE:
                raise
            continue
        if _places(compiled) == wanted:
            return compiled
    hint = "call it without a cache, or merge it"
    raise GraftError("GC031", "some adapted places are outside the layers and maps that are graphs", hint=hint)


_NOT_THERE = ("GC010", "GC011", "GC012", "GC015")
"""Errors for targets that match nothing or match only in part."""


def _places(compilation: Compilation) -> dict[str, set[tuple[str, ...]]]:
    """Return the adapted places, by adaptation name."""
    every = ((resolved.name, site.key) for resolved in compilation.main.resolved for site, _ in resolved.places)
    places: dict[str, set[tuple[str, ...]]] = {}
    for name, key in every:
        places.setdefault(name, set()).add((key.module, key.name, str(key.part)))
    return places


def _by_names(spec: Spec, places: Mapping[str, set[tuple[str, ...]]]) -> Spec:
    """Return a spec that selects the same places by the paths of their modules."""
    adapt = []
    for adaptation in spec.adapt:
        paths = tuple(sorted({module for module, *_ in places.get(adaptation.name or adaptation.method, ())}))
        adapt.append(adaptation.model_copy(update={"target": Target(modules=paths)}) if paths else adaptation)
    return spec.model_copy(update={"adapt": tuple(adapt)})
