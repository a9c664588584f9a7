"""The controllers and objectives of a Compilation, over its live tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from graftc.compiler.pipeline import Compilation
from graftc.passes.core.registry import method_for
from graftc.passes.core.steering import Controller, Place, TensorObjective
from graftc.passes.core.store import Store


@dataclass(frozen=True)
class Steerings:
    """What steers the training of a Compilation, by adaptation."""

    controllers: Mapping[str, Controller[Any]]
    objectives: Mapping[str, TensorObjective[Any]]


class Live(Mapping[str, Tensor]):
    """Tensors of the Store by part, each looked up when it is asked for."""

    def __init__(self, store: Store, names: Mapping[str, str]) -> None:
        self._store, self._names = store, names

    def __getitem__(self, part: str) -> Tensor:
        return self._store.get(self._names[part])

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def steerings(compilation: Compilation) -> Steerings:
    """The controllers and objectives of a Compilation."""
    controllers: dict[str, Controller[Any]] = {}
    objectives: dict[str, TensorObjective[Any]] = {}
    for resolved in compilation.main.resolved:
        method, parts = method_for(resolved.spec.method), compilation.parts.get(resolved.name, {})
        places = [Place(site, spec, Live(compilation.store, parts.get(site.key, {}))) for site, spec in resolved.places]
        shared = Live(compilation.store, parts.get(None, {}))
        if method.controller is not None:
            controllers[resolved.name] = method.controller(resolved.spec, places, shared)
        if method.objective is not None:
            objectives[resolved.name] = method.objective(resolved.spec, places, shared)
    return Steerings(controllers, objectives)
