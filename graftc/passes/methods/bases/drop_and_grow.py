"""Repeated selection of a weight's trained entries: those with the smallest deltas are replaced by others."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.method.base_gradients import BaseGradients
from graftc.passes.core.method.entry_selection import largest
from graftc.passes.core.method.sparse_optimiser import Seen, SparseOptimiser
from graftc.passes.core.method.steering import AdaptedSite, unknown_length
from graftc.passes.core.weights.sharding import Spread
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.bases.scheduled import ScheduledController
from graftc.passes.methods.bases.sparse import regions_at
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.methods.spiel import SpIEL

BLOCK = 1 << 22
"""The number of entry scores that are computed at a time."""


@dataclass(frozen=True)
class Entries:
    """The trained entries of one weight.

    Attributes:
        place: the place of the weight.
        region: the part of the weight that the entries belong to.
        number: the index of the weight among the adaptation's weights.
    """

    place: AdaptedSite[SpIEL]
    region: WeightSlice
    number: int

    def tensor(self, kind: str) -> Tensor:
        """Return the adaptation's tensor of one kind for this weight."""
        return self.place.tensors[f"{self.region.part}_{kind}"]


class Reselection(ScheduledController[SpIEL]):
    """Controller that replaces entries after optimiser steps ``t`` with ``t % interval == accumulation_steps``.

    Steps count from 1. Everything that a window has gathered is stored in buffers, so a training run resumed within a
    window continues with bitwise identical values.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._gradients = BaseGradients(self._gather)
        self._chosen: set[int] = set()
        self._warned: set[str] = set()
        self._turnover: dict[int, float] = {}

    @cached_property
    def entries(self) -> list[Entries]:
        """All weights with trained entries, each once."""
        every = regions_at(self.places, biases=False)
        chosen = [(place, region) for place, region in every if f"{region.part}_indices" in place.tensors]
        return [Entries(place, region, number) for number, (place, region) in enumerate(chosen)]

    def figures(self, place: AdaptedSite[SpIEL]) -> Mapping[str, Tensor | float]:
        """Return ``turnover``: the share of a place's entries that were exchanged in the last replacement.

        The result is empty before the first replacement in this process.
        """
        own = self._turnover.get(self._number_at.get(id(place), -1))
        return {} if own is None else {"turnover": own}

    @cached_property
    def _number_at(self) -> dict[int, int]:
        return {id(entries.place): entries.number for entries in self.entries}

    def position(self, number: int) -> int:
        """Return the 1-based position of optimiser step ``number`` in its window; 0 outside windows."""
        position = (number - 1) % self.spec.interval + 1
        return position if position <= self.spec.accumulation_steps else 0

    def fraction(self, number: int) -> Fraction | float:
        """Return the share of the entries that is replaced after optimiser step ``number``.

        Raises:
            GraftError: GC026 if the number of steps is not known.
        """
        if self.total is None and self.spec.drop_fraction:
            raise unknown_length(f"the share of entries that {self.spec.name!r} replaces")
        if self.position(number) != self.spec.accumulation_steps or (self.total is not None and number >= self.total):
            return 0
        if number == self.spec.accumulation_steps:
            return 1
        first = Fraction(str(self.spec.drop_fraction))
        if self.total is None or not first:
            return 0
        if self.spec.decay == "linear":
            return first * (1 - Fraction(number, self.total))
        return float(first) * (1 + math.cos(math.pi * number / self.total)) / 2

    def check_spread(self, spread: Spread) -> None:
        """Refuse distributed training in which entries cannot be replaced.

        The optimiser stores moments per entry, and variant AG reads gradients of the base's weights that come from one
        process only.

        Raises:
            GraftError: GC130 for sharded weights, and for variant AG.
        """
        if spread.sharded:
            message = f"{self.spec.name!r} replaces entries of whole weights, but the weights are sharded"
            raise GraftError("GC130", message, hint="use DistributedDataParallel with variant: MA")
        if self.spec.variant == "AG":
            message = f"{self.spec.name!r} reads weight gradients from only one of {spread.processes} processes"
            raise GraftError("GC130", message, hint="set variant: MA, which needs no gradients, or use one process")

    # Windows

    def before_forward(self) -> None:
        """Request gradients of the base's weights if the next step is in a window."""
        if self.spec.variant == "MA":
            return  # before reading the step count, which would wait for the device
        number = self.steps + 1
        position = self.position(number)
        last = number - position + self.spec.accumulation_steps
        if not position:
            return
        if (self.total is not None or not self.spec.drop_fraction) and not self.fraction(last):
            return
        self._position = position
        if not self._gradients.waiting:
            self._forget_step()  # a step during which the state was saved starts over
        self._chosen = {i for i, chosen in enumerate(self.shared["seen"].tolist()) if chosen}
        names = (e.region.tensor for e in self.entries if e.tensor("delta").requires_grad)
        self._gradients.want({name: self.places[0].base[name] for name in names})

    def pause(self) -> None:
        """Request no gradients from later passes; those of earlier passes are still gathered."""
        self._gradients.pause()

    def skip_step(self) -> None:
        """Restart the step, which chooses candidates again if it was the first of its window."""
        self._gradients.release()

    _position = 0

    @torch.no_grad()
    def _forget_step(self) -> None:
        """Discard what has been gathered so far for the next optimiser step."""
        self.shared["seen"].masked_fill_(self.shared["seen"] == self._position, 0)
        for entries in self.entries:
            entries.tensor("gradient").zero_()

    @cached_property
    def _by_tensor(self) -> dict[str, list[Entries]]:
        by_tensor: dict[str, list[Entries]] = defaultdict(list)
        for entries in self.entries:
            by_tensor[entries.region.tensor].append(entries)
        return by_tensor

    def _gather(self, name: str, gradient: Tensor) -> None:
        """Add a weight's gradient from a backward pass, choosing candidates first if the weight has none."""
        for entries in self._by_tensor[name]:
            candidates = entries.tensor("candidates")
            if entries.number not in self._chosen:
                numbers = _largest_sizes(entries.region.entries(gradient), candidates.numel())
                candidates.copy_(entries.region.places(numbers).sort().values)
                self.shared["seen"][entries.number] = self._position
                self._chosen.add(entries.number)
            entries.tensor("gradient").add_(gradient.reshape(-1).index_select(0, candidates))

    def _close_step(self) -> None:
        """Add the complete gradient of an optimiser step, and its square, to the sums of the window."""
        for entries in self.entries:
            gradient = entries.tensor("gradient")
            entries.tensor("sum").add_(gradient)
            entries.tensor("square").addcmul_(gradient, gradient)
            gradient.zero_()

    # Replacement

    def step(self, number: int) -> None:
        """Replace entries if this step ends a window, and update what the window has gathered.

        Raises:
            GraftError: GC026 if the number of steps is not known, GC045 if new entries are chosen by second moments but
                the optimiser does not store these by row and column.
        """
        self._gradients.release()
        share, gathers = self.fraction(number), self.spec.variant == "AG"
        if gathers and self.position(number):
            self._close_step()
        if share:
            self._replace(share)
        if gathers and self.position(number) == self.spec.accumulation_steps:
            self.shared["seen"].zero_()
            for entries in self.entries:
                entries.tensor("sum").zero_()
                entries.tensor("square").zero_()

    def _replace(self, share: Fraction | float) -> None:
        trained = [e for e in self.entries if e.tensor("delta").requires_grad]
        if not trained:
            return
        move = self._by_gradients(trained) if self.spec.variant == "AG" else self._by_moments(trained)
        for entries in trained:
            count = math.floor(share * entries.tensor("delta").numel())
            self._turnover[entries.number] = 0.0
            if count:
                move(entries, _largest(-entries.tensor("delta").detach().abs(), count))

    def _by_gradients(self, trained: Sequence[Entries]) -> Callable[[Entries, Tensor], None]:
        seen = self.shared["seen"].tolist()
        optimiser = self._optimiser(trained)
        if not any(seen):
            message = f"{self.spec.name!r} has received no weight gradients, so none of its entries are replaced"
            hint = "during training, call the model itself instead of the one that torch.compile returned"
            if self._first("no gradients"):
                warn("GC025", message, hint=hint)
        elif optimiser is None:
            message = f"{self.spec.name!r} has replaced entries, but the optimiser has not been notified"
            if self._first("optimiser"):
                warn("GC046", message, hint="train with graftc.optim.AgedAdamW(compiled, ...)")

        def move(entries: Entries, dropped: Tensor) -> None:
            at = seen[entries.number]
            if at:
                self._move_by_gradients(entries, dropped, self.spec.accumulation_steps - at + 1, optimiser)

        return move

    def _move_by_gradients(
        self, entries: Entries, dropped: Tensor, steps: int, optimiser: SparseOptimiser | None
    ) -> None:
        """Replace dropped entries with candidates; an entry that is both dropped and a candidate stays unchanged."""
        active, candidates, total = (entries.tensor(kind) for kind in ("indices", "candidates", "sum"))
        leaves = torch.zeros(active.shape, dtype=torch.bool, device=active.device).index_fill_(0, dropped, True)
        valid = ~torch.isin(candidates, active[~leaves]) & total.isfinite()
        score = torch.where(valid, total.abs(), -torch.inf)
        grown = _largest(score, min(dropped.numel(), int(valid.sum())))
        outgoing = dropped[~torch.isin(active[dropped], candidates[grown])]
        grown = grown[~torch.isin(candidates[grown], active[dropped])]
        seen = Seen(total[grown] / steps, entries.tensor("square")[grown] / steps, steps)
        self._put(entries, outgoing, candidates[grown], optimiser, seen)

    def _by_moments(self, trained: Sequence[Entries]) -> Callable[[Entries, Tensor], None]:
        optimiser = self._optimiser(trained)
        if optimiser is None or not optimiser.factored:
            message = f"{self.spec.name!r} needs second moments of rows and columns, but the optimiser has none"
            raise GraftError("GC045", message, hint="train with graftc.optim.SM3(compiled, ...)")

        def move(entries: Entries, dropped: Tensor) -> None:
            factors = optimiser.accumulators(entries.tensor("delta"))
            if factors is not None:
                incoming = largest_products(entries.region, entries.tensor("indices"), *factors, dropped.numel())
                self._put(entries, dropped, incoming, optimiser)

        return move

    def _put(
        self,
        entries: Entries,
        outgoing: Tensor,
        incoming: Tensor,
        optimiser: SparseOptimiser | None,
        seen: Seen | None = None,
    ) -> None:
        """Replace outgoing entries with incoming ones; if fewer come in, replace those with the smallest deltas."""
        indices, delta = entries.tensor("indices"), entries.tensor("delta")
        if incoming.numel() < outgoing.numel():
            outgoing = outgoing[_largest(-delta.detach()[outgoing].abs(), incoming.numel())]
        self._turnover[entries.number] = outgoing.numel() / indices.numel()
        indices.index_copy_(0, outgoing, incoming.to(indices.dtype))
        delta.index_fill_(0, outgoing, 0)
        if optimiser is not None:
            optimiser.replaced(delta, outgoing, seen)

    def _optimiser(self, trained: Sequence[Entries]) -> SparseOptimiser | None:
        """Return the optimiser if it has to be notified of replacements and trains these entries; otherwise None."""
        optimiser = self.optimiser
        if isinstance(optimiser, SparseOptimiser) and all(optimiser.holds(e.tensor("delta")) for e in trained):
            return optimiser
        return None

    def _first(self, what: str) -> bool:
        """Return whether this is the first warning of its kind, and record it."""
        first = what not in self._warned
        self._warned.add(what)
        return first


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the indices of the largest scores, ascending; ties go to the first ones."""
    return largest([lambda: scores], count)[0]


def _largest_sizes(values: Tensor, count: int) -> Tensor:
    """Return the indices of the largest absolute values, ascending; ties go to the first ones.

    The values are those of a whole weight, so only `BLOCK` of them are processed at a time.
    """
    blocks = [values[start : start + BLOCK] for start in range(0, values.numel(), BLOCK)]
    by_block = largest([block.abs for block in blocks], count)
    return torch.cat([numbers + number * BLOCK for number, numbers in enumerate(by_block)])


def largest_products(region: WeightSlice, active: Tensor, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """Return the entries of a weight, except active ones, with the largest ``rows[i] * columns[j]``.

    Ties go to the first ones. The products are computed in blocks of rows, about `BLOCK` products at a time.

    Args:
        region: the part of the weight that the entries belong to.
        active: indices of the entries to exclude.
        rows, columns: factors for the rows and columns of the stored tensor; its last axis is that of the columns.
        count: the number of entries to return; fewer are returned if there are not enough.

    Returns:
        Indices into the stored tensor, ``int64``, ascending.
    """
    rows, columns = rows.nan_to_num(0.0), columns.nan_to_num(0.0)  # infinity times zero is not a score
    width, device = columns.numel(), columns.device
    others = None
    if not region.whole:  # a mask by row and column, one of which has size 1
        mask = ~region.mask(device)
        others = mask.expand(*region.shape[:-1], -1).reshape(-1, mask.shape[-1])
    taken = active.sort().values
    height = max(1, BLOCK // width)

    def products(start: int) -> Tensor:
        stop = min(start + height, rows.numel())
        scores = torch.outer(rows[start:stop], columns)
        if others is not None:
            scores.masked_fill_(others[start:stop], -torch.inf)
        edges = torch.tensor([start * width, stop * width], device=device, dtype=taken.dtype)
        low, high = torch.searchsorted(taken, edges).tolist()
        return scores.view(-1).index_fill_(0, taken[low:high].long() - start * width, -torch.inf)

    starts = range(0, rows.numel(), height)
    by_block = largest([partial(products, start) for start in starts], min(count, region.size - active.numel()))
    return torch.cat([numbers + start * width for start, numbers in zip(starts, by_block, strict=True)])
