"""Figures that describe each site during training: ranks, shares of entries, gate values, routes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.steering import live_places
from graftc.passes.core.method.capabilities import Figured, Observed, Reading
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.method.steering import Controller
from graftc.passes.graph.compose import GATE_READING
from graftc.specs.compose import Gate

Figures: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Values by adaptation, site and figure name."""


@dataclass(frozen=True)
class Figure:
    """One figure of one site.

    Attributes:
        adaptation, site, name: the adaptation, the site, and the name of the figure.
        value: a number, or a scalar tensor on any device.
    """

    adaptation: str
    site: str
    name: str
    value: Tensor | float


def live_figures(compilation: Compilation, controllers: Mapping[str, Controller[Any]]) -> Iterator[Figure]:
    """Yield the current figures of every site, computed from tensors and by controllers."""
    for resolved in compilation.main.resolved:
        method, controller = method_for(resolved.spec.method), controllers.get(resolved.name)
        if controller is None and not isinstance(method, Figured):
            continue
        places, shared = live_places(compilation, resolved)
        for place in places if controller is None else controller.places:
            numbers: dict[str, Tensor | float] = {}
            if isinstance(method, Figured):
                numbers |= method.figures(place.spec, {**shared, **place.tensors})
            if controller is not None:
                numbers |= controller.figures(place)
            for name, value in numbers.items():
                yield Figure(resolved.name, str(place.site.key), name, value)


@dataclass(frozen=True)
class SiteReading:
    """A `Reading` of one site.

    Attributes:
        adaptation, site: the adaptation and the site.
        reading: the quantity to read.
    """

    adaptation: str
    site: str
    reading: Reading


def live_readings(compilation: Compilation) -> Iterator[tuple[Tensor, SiteReading]]:
    """Yield the readings to take in a forward pass, each preceded by the parameter that the observed operators read."""
    gates = {m.name for u in compilation.units if isinstance(u.composition, Gate) for m in u.members}
    for resolved in compilation.main.resolved:
        method = method_for(resolved.spec.method)
        composed = [GATE_READING] if resolved.name in gates else []
        if not composed and not isinstance(method, Observed):
            continue
        places, _ = live_places(compilation, resolved)
        for place in places:
            own = method.readings(place.spec) if isinstance(method, Observed) else ()
            for reading in (*own, *composed):
                if reading.part in place.tensors:
                    yield place.tensors[reading.part], SiteReading(resolved.name, str(place.site.key), reading)


@torch.no_grad()
def as_numbers(figures: Iterable[Figure]) -> Figures:
    """Return figures as plain numbers; figures on the same device are copied together."""
    every = list(figures)
    by_device: dict[torch.device, list[int]] = {}
    values: dict[int, float] = {}
    for index, figure in enumerate(every):
        if isinstance(figure.value, Tensor):
            by_device.setdefault(figure.value.device, []).append(index)
        else:
            values[index] = float(figure.value)
    for indices in by_device.values():
        scalars = torch.stack([every[i].value.detach().double().reshape(()) for i in indices])  # type: ignore[union-attr]
        values |= dict(zip(indices, scalars.tolist(), strict=True))
    numbers: Figures = {}
    for index, figure in enumerate(every):
        numbers.setdefault(figure.adaptation, {}).setdefault(figure.site, {})[figure.name] = values[index]
    return numbers
