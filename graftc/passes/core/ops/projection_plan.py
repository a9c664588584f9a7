"""The plan of a call to `graftc.passes.core.ops.projections`, and helpers shared by its forward and backward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graftc.passes.core.ops.autocasting import cast
from graftc.passes.core.ops.dropout import factor
from graftc.passes.core.ops.plain_projections import Runs, Weights


class LowRankUpdate(NamedTuple):
    """A product of two factors that is added to a result.

    Attributes:
        of: index of the map.
        source: index of the source to which the first factor is applied; 0 is the maps' input.
        scale: scale of the product.
        runs: columns of the result to which the product is added.
    """

    of: int
    source: int
    scale: float
    runs: Runs = ()


@dataclass(frozen=True)
class Plan:
    """The structure of a call, known before any tensor is computed.

    Attributes:
        transposed, updates: the arguments of the call, except that the updates' scales also compensate for dropout.
        masked: for each source, including the maps' input, whether it is a mask of that input.
        of: for each source, the indices of its updates.
        at: for each map, the indices of its updates.
    """

    transposed: tuple[bool, ...]
    updates: tuple[LowRankUpdate, ...]
    masked: tuple[bool, ...]
    of: tuple[tuple[int, ...], ...]
    at: tuple[tuple[int, ...], ...]

    @property
    def sources(self) -> int:
        """The number of sources, including the maps' input."""
        return len(self.masked)

    def read(self, source: int) -> int:
        """Return the source that receives a source's gradient: the maps' input for a mask, otherwise itself."""
        return 0 if self.masked[source] else source


@lru_cache(maxsize=1024)
def plan_of(
    transposed: tuple[bool, ...],
    updates: tuple[tuple[int, int, float, Runs], ...],
    dropped: tuple[float | None, ...],
) -> Plan:
    """Return the `Plan` of a call."""
    given = (None, *dropped)
    factors = [1.0 if p is None else factor(p) for p in given]
    scaled = tuple(LowRankUpdate(of, source, scale * factors[source], runs) for of, source, scale, runs in updates)
    of = tuple(tuple(i for i, u in enumerate(scaled) if u.source == s) for s in range(len(given)))
    at = tuple(tuple(i for i, u in enumerate(scaled) if u.of == m) for m in range(len(transposed)))
    return Plan(transposed, scaled, tuple(p is not None for p in given), of, at)


def flat(
    sources: Sequence[Tensor],
    weights: Weights,
    factors: Sequence[tuple[Tensor, Tensor, Tensor | None]],
) -> list[Tensor | None]:
    """Return all tensors of a call except the maps' input, in order."""
    return [*sources, *(t for three in (*weights, *factors) for t in three)]


class Given(NamedTuple):
    """The values of a list made by `flat`, or other values with the same structure."""

    sources: list[Any]
    weights: list[list[Any]]
    factors: list[list[Any]]

    @classmethod
    def of(cls, plan: Plan, x: Any, flat: Sequence[Any]) -> Given:
        """Restore the structure of values that were flattened by `flat`, and include the maps' input."""
        start = plan.sources - 1
        threes = [list(flat[i : i + 3]) for i in range(start, len(flat), 3)]
        return cls([x, *flat[:start]], threes[: len(plan.transposed)], threes[len(plan.transposed) :])


def stacked(numbers: Sequence[int], given: Given, dtype: torch.dtype | None) -> Tensor:
    """Concatenate the first factors of some updates into one tensor, ``[ranks, in]``."""
    return joined([cast(given.factors[number][0], dtype) for number in numbers], 0)


def apart(plan: Plan, stacked: Sequence[Tensor | None], ranks: Sequence[int]) -> list[Tensor | None]:
    """Split each source's tensor, whose columns belong to several updates, into one ``[rows, rank]`` per update."""
    narrow: list[Tensor | None] = [None] * len(ranks)
    for numbers, value in zip(plan.of, stacked, strict=True):
        if value is not None:
            parts = torch.split(value, [ranks[n] for n in numbers], 1) if len(numbers) > 1 else (value,)
            for number, part in zip(numbers, parts, strict=True):
                narrow[number] = part
    return narrow


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate tensors along an axis; a single one is returned unchanged."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def rows(tensor: Tensor) -> Tensor:
    """Reshape ``[..., width]`` to ``[rows, width]``."""
    return tensor.reshape(-1, tensor.shape[-1])
