"""``graftc::route``: choices among values, such as a router's among experts, recorded in one run of a graph and imposed
in another.

Where two scores differ by no more than rounding, two ways of computing the same function may choose differently, and
everything downstream then comes from other experts. Runs with the same choices can be compared number by number.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True)
class RouteChoice:
    """What one choice of a graph saw and took in one run.

    Attributes:
        scores: what was chosen among, ``[..., n]`` with the axis of the choice last; floating point.
        chosen: the numbers of the chosen on that axis, the first one first: ``int64[..., k]``.
    """

    scores: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Routes:
    """The choices of one run.

    Attributes:
        imposed: by name, those that the run has to take, whatever its own are; a choice that is not there is its own.
        seen: by name, what the run would have chosen by its own scores; filled as it runs.
    """

    imposed: Mapping[str, RouteChoice] = field(default_factory=dict)
    seen: dict[str, RouteChoice] = field(default_factory=dict)

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Inside, graphs with `route` record here, and take what is imposed."""
        token = _CURRENT.set(self)
        try:
            yield
        finally:
            _CURRENT.reset(token)


_CURRENT: ContextVar[Routes | None] = ContextVar("routes", default=None)


@torch.library.custom_op("graftc::route", mutates_args=())
def route(scores: Tensor, chosen: Tensor, dim: int | None, name: str) -> tuple[Tensor, Tensor]:
    """The choice that a run is to take: its own, or what is imposed on it (`Routes.taken`).

    Args:
        scores: what is chosen among; floating point.
        chosen: ``int64``, the run's own choice, with the axis or, of a single number, without.
        dim: the axis; None for a number among all elements.
        name: of the choice in the graph.

    Returns:
        The scores of what is taken, and its numbers, both of the shape of ``chosen``.
    """
    rows, axis = (scores.reshape(-1), 0) if dim is None else (scores, dim)
    whole = dim is not None and chosen.dim() == scores.dim()
    rows = rows.movedim(axis, -1)
    own = chosen.movedim(axis, -1) if whole else chosen.reshape(*rows.shape[:-1], 1)
    taken, routes = own, _CURRENT.get()
    if routes is not None:
        routes.seen[name] = RouteChoice(rows.clone(), own.clone())
        imposed = routes.imposed.get(name)
        if imposed is not None and imposed.chosen.shape == own.shape:
            taken = imposed.chosen.to(own.device)
    found = rows.gather(-1, taken), taken.clone()
    values, numbers = (each.movedim(-1, axis) if whole else each.reshape(chosen.shape) for each in found)
    return values.contiguous(), numbers.contiguous()


@route.register_fake
def _(scores: Tensor, chosen: Tensor, dim: int | None, name: str) -> tuple[Tensor, Tensor]:
    return scores.new_empty(chosen.shape), torch.empty_like(chosen)
