"""``graftc::route``, which records choices, such as a router's choice of experts, and imposes them on another run.

If two scores differ only by rounding, two implementations of the same function may choose differently, and everything
downstream then comes from different experts. Runs with the same choices can be compared element by element.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from graftc.passes.core.contexts import having
from graftc.passes.core.ops.declaring import operator


@dataclass(frozen=True)
class RouteChoice:
    """The scores and the outcome of one choice that a graph makes in one run.

    Attributes:
        scores: the values among which the choice was made, ``[..., n]``, with the axis of the choice last; floating
            point.
        chosen: indices of the chosen values along that axis, the first choice first: ``int64[..., k]``.
    """

    scores: Tensor
    chosen: Tensor


@dataclass(frozen=True)
class Routes:
    """The choices of one run.

    Attributes:
        imposed: by name, the choices that the run must use instead of its own; it uses its own for missing names.
        seen: by name, the choices that follow from the run's own scores; filled during the run.
    """

    imposed: Mapping[str, RouteChoice] = field(default_factory=dict)
    seen: dict[str, RouteChoice] = field(default_factory=dict)

    def taken(self) -> AbstractContextManager[None]:
        """Return a context in which `route` records the run's own choices in `seen` and uses the `imposed` ones."""
        return having(_CURRENT, self)


_CURRENT: ContextVar[Routes | None] = ContextVar("routes", default=None)


def _choice_like(scores: Tensor, chosen: Tensor, dim: int | None, name: str) -> tuple[Tensor, Tensor]:
    return scores.new_empty(chosen.shape), torch.empty_like(chosen)


@operator(_choice_like)
def route(scores: Tensor, chosen: Tensor, dim: int | None, name: str) -> tuple[Tensor, Tensor]:
    """Return the choice that a run must use: its own, or the one imposed on it (`Routes.taken`).

    Args:
        scores: the values to choose from; floating point.
        chosen: ``int64``, the run's own choice; it has the axis, or lacks it if a single index is chosen.
        dim: the axis; None for an index into all elements.
        name: name of the choice in the graph.

    Returns:
        The scores of the chosen values and their indices, both of the shape of ``chosen``.
    """
    rows, axis = (scores.reshape(-1), 0) if dim is None else (scores, dim)
    keeps_axis = dim is not None and chosen.dim() == scores.dim()
    rows = rows.movedim(axis, -1)
    own = chosen.movedim(axis, -1) if keeps_axis else chosen.reshape(*rows.shape[:-1], 1)
    taken, routes = own, _CURRENT.get()
    if routes is not None:
        routes.seen[name] = RouteChoice(rows.clone(), own.clone())
        imposed = routes.imposed.get(name)
        if imposed is not None and imposed.chosen.shape == own.shape:
            taken = imposed.chosen.to(own.device)
    pair = rows.gather(-1, taken), taken.clone()
    values, numbers = (each.movedim(-1, axis) if keeps_axis else each.reshape(chosen.shape) for each in pair)
    return values.contiguous(), numbers.contiguous()
