"""Create a Compilation's controllers and objectives, which use its live tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.compose import Unit
from graftc.compiler.resolve.resolver import Resolved
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.steering import AdaptedSite, Controller, OutputObjective, TensorObjective
from graftc.passes.core.weights.store import Store
from graftc.passes.graph.compose import FusionObjective
from graftc.specs.base import MethodSpec
from graftc.specs.compose import Fuse


@dataclass(frozen=True)
class Steerings:
    """The controllers and objectives of a Compilation, by adaptation; `outputs` compare several passes."""

    controllers: Mapping[str, Controller[Any]]
    objectives: Mapping[str, TensorObjective[Any]]
    outputs: Mapping[str, OutputObjective[Any]]


class Live(Mapping[str, Tensor]):
    """A mapping from parts to tensors of the Store, each looked up on access."""

    def __init__(self, store: Store, names: Mapping[str, str]) -> None:
        self._store, self._names = store, names

    def __getitem__(self, part: str) -> Tensor:
        return self._store.get(self._names[part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class LiveBase(Mapping[str, Tensor]):
    """A mapping from names to base tensors of the Store, each looked up on access."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def __getitem__(self, name: str) -> Tensor:
        return self._store.get(name)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._store.weights())

    def __len__(self) -> int:
        return sum(1 for _ in self)


def live_places(compilation: Compilation, resolved: Resolved) -> tuple[list[AdaptedSite[Any]], Live]:
    """Return an adaptation's places with their tensors, and the tensors that belong to it as a whole."""
    store, parts = compilation.store, compilation.parts.get(resolved.name, {})
    base = LiveBase(store)
    places = [AdaptedSite(site, spec, Live(store, parts.get(site.key, {})), base) for site, spec in resolved.places]
    return places, Live(store, parts.get(None, {}))


def steerings(compilation: Compilation) -> Steerings:
    """Return the controllers and objectives of a Compilation."""
    controllers: dict[str, Controller[Any]] = {}
    objectives: dict[str, TensorObjective[Any]] = {}
    outputs: dict[str, OutputObjective[Any]] = {}
    steered = any(_steers(item.spec) for item in compilation.places().resolved)
    for resolved in compilation.main.resolved if steered else ():
        method = method_for(resolved.spec.method)
        places, shared = live_places(compilation, resolved)
        if method.controller is not None and method.controller.wanted(resolved.spec):
            controllers[resolved.name] = method.controller(resolved.spec, places, shared)
        if method.objective is not None and method.objective.wanted(resolved.spec):
            objective = method.objective(resolved.spec, places, shared)
            if isinstance(objective, OutputObjective):
                outputs[resolved.name] = objective
            else:
                objectives[resolved.name] = objective
    for unit in compilation.units if compilation.spec.compose else ():
        if isinstance(unit.composition, Fuse) and unit.composition.values and unit.composition.regularization:
            objectives[unit.name] = FusionObjective(unit.composition, list(_own_places(compilation, unit)), {})
    return Steerings(controllers, objectives, outputs)


def _steers(spec: MethodSpec) -> bool:
    """Return whether an adaptation has a controller or an objective that has anything to do."""
    method = method_for(spec.method)
    return any(kind is not None and kind.wanted(spec) for kind in (method.controller, method.objective))


def _own_places(compilation: Compilation, unit: Unit) -> Iterator[AdaptedSite[Any]]:
    """Yield the places where a composition has its own tensors."""
    parts = compilation.parts.get(unit.name, {})
    for site, _ in unit.members[0].places:
        if site.key in parts:
            yield AdaptedSite(site, unit.composition, Live(compilation.store, parts[site.key]))
