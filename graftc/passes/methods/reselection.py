"""Which entries of a weight train, decided again and again: the smallest deltas go, others come."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.method.base_gradients import BaseGradients
from graftc.passes.core.method.sparse_optimiser import Seen, SparseOptimiser
from graftc.passes.core.method.steering import AdaptedSite, Controller, unknown_length
from graftc.passes.core.sites.entries import largest
from graftc.passes.core.weights.sharding import Spread
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.methods.selection import regions_at
from graftc.specs.errors.diagnostics import GraftError, warn
from graftc.specs.methods.spiel import SpIEL

BLOCK = 1 << 22
"""How many scores of entries are worked out at a time."""


@dataclass(frozen=True)
class Entries:
    """The entries of one weight that train.

    Attributes:
        place: where.
        region: of which they are.
        number: counts the weights of the adaptation.
    """

    place: AdaptedSite[SpIEL]
    region: WeightSlice
    number: int

    def tensor(self, kind: str) -> Tensor:
        """A tensor of the adaptation at this weight."""
        return self.place.tensors[f"{self.region.part}_{kind}"]


class Reselection(Controller[SpIEL]):
    """Replaces entries after the optimiser steps ``t`` with ``t % interval == accumulation_steps``, ``t`` from 1.

    All that a window has gathered is in buffers, so that a training that is resumed within one goes on to the bit.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._gradients = BaseGradients(self._gather)
        self._chosen: set[int] = set()
        self._warned: set[str] = set()
        self._turnover: dict[int, float] = {}
        if self.spec.total_steps is not None:
            self.begin(self.spec.total_steps)

    def begin(self, total: int) -> None:
        """See `Controller.begin`. ``total_steps`` of the spec goes before."""
        super().begin(self.spec.total_steps or total)

    @cached_property
    def entries(self) -> list[Entries]:
        """Every weight with entries that train, once."""
        every = regions_at(self.places, biases=False)
        chosen = [(place, region) for place, region in every if f"{region.part}_indices" in place.tensors]
        return [Entries(place, region, number) for number, (place, region) in enumerate(chosen)]

    def figures(self, place: AdaptedSite[SpIEL]) -> Mapping[str, Tensor | float]:
        """See `Controller.figures`: ``turnover``, the share of the entries of a place's weight that the last
        replacement has replaced; none before the first one of this process."""
        own = self._turnover.get(self._number_at.get(id(place), -1))
        return {} if own is None else {"turnover": own}

    @cached_property
    def _number_at(self) -> dict[int, int]:
        return {id(entries.place): entries.number for entries in self.entries}

    def position(self, number: int) -> int:
        """Which step of a window the optimiser step of this number is, from 1; 0 outside of windows."""
        position = (number - 1) % self.spec.interval + 1
        return position if position <= self.spec.accumulation_steps else 0

    def fraction(self, number: int) -> Fraction | float:
        """Which share of the entries is replaced after the optimiser step of this number.

        Raises:
            GraftError: GC026 where the number of steps is not known.
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
        """See `Controller.check_spread`. The optimiser keeps moments by entry, and the gradients of the base's weights,
        which variant AG looks at, are those of one process.

        Raises:
            GraftError: GC130 for weights that are sharded, and for variant AG.
        """
        if spread.sharded:
            message = f"{self.spec.name!r} replaces entries of whole weights, and these are sharded"
            raise GraftError("GC130", message, hint="DistributedDataParallel trains variant: MA")
        if self.spec.variant == "AG":
            message = f"{self.spec.name!r} looks at the gradients of weights in one process of {spread.processes}"
            raise GraftError("GC130", message, hint="set variant: MA, which needs none, or train in one process")

    # Windows

    def before_forward(self) -> None:
        """See `Controller.before_forward`. In a window the base's weights want gradients."""
        if self.spec.variant == "MA":
            return  # before the count of steps is read, which waits for the device
        number = self.steps + 1
        position = self.position(number)
        last = number - position + self.spec.accumulation_steps
        if not position:
            return
        if (self.total is not None or not self.spec.drop_fraction) and not self.fraction(last):
            return
        self._position = position
        if not self._gradients.waiting:
            self._forget_step()  # where state was kept within a step, that step starts anew
        self._chosen = {i for i, chosen in enumerate(self.shared["seen"].tolist()) if chosen}
        names = (e.region.tensor for e in self.entries if e.tensor("delta").requires_grad)
        self._gradients.want({name: self.places[0].base[name] for name in names})

    def pause(self) -> None:
        """See `Controller.pause`."""
        self._gradients.pause()

    def skip_step(self) -> None:
        """See `Controller.skip_step`. The step starts anew, and chooses candidates again where it was the first."""
        self._gradients.release()

    _position = 0

    @torch.no_grad()
    def _forget_step(self) -> None:
        """Forget what the optimiser step that is to come has been given so far."""
        self.shared["seen"].masked_fill_(self.shared["seen"] == self._position, 0)
        for entries in self.entries:
            entries.tensor("gradient").zero_()

    @cached_property
    def _by_tensor(self) -> dict[str, list[Entries]]:
        found: dict[str, list[Entries]] = {}
        for entries in self.entries:
            found.setdefault(entries.region.tensor, []).append(entries)
        return found

    def _gather(self, name: str, gradient: Tensor) -> None:
        """Take what a backward pass gives for a weight."""
        for entries in self._by_tensor[name]:
            candidates = entries.tensor("candidates")
            if entries.number not in self._chosen:
                numbers = _largest_sizes(entries.region.entries(gradient), candidates.numel())
                candidates.copy_(entries.region.places(numbers).sort().values)
                self.shared["seen"][entries.number] = self._position
                self._chosen.add(entries.number)
            entries.tensor("gradient").add_(gradient.reshape(-1).index_select(0, candidates))

    def _close_step(self) -> None:
        """The gradient of an optimiser step is known as a whole, and its square."""
        for entries in self.entries:
            gradient = entries.tensor("gradient")
            entries.tensor("sum").add_(gradient)
            entries.tensor("square").addcmul_(gradient, gradient)
            gradient.zero_()

    # Replacement

    def step(self, number: int) -> None:
        """See `Controller.step`.

        Raises:
            GraftError: GC026 where the number of steps is not known, GC045 where new entries are those of the largest
                second moments, and the optimiser has none by row and column.
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
            message = f"{self.spec.name!r} has seen no gradients of weights, so none of its entries is replaced"
            hint = "call the model itself while training, not what torch.compile has made of it"
            if self._first("no gradients"):
                warn("GC025", message, hint=hint)
        elif optimiser is None:
            message = f"{self.spec.name!r} has replaced entries, and the optimiser does not know of it"
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
        """Give the places of dropped entries to candidates; one that is both stays as it is."""
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
            message = f"{self.spec.name!r} adds entries by the second moments of rows and columns, and there are none"
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
        """Put entries in the places of others; where they are fewer, of those with the smallest deltas."""
        indices, delta = entries.tensor("indices"), entries.tensor("delta")
        if incoming.numel() < outgoing.numel():
            outgoing = outgoing[_largest(-delta.detach()[outgoing].abs(), incoming.numel())]
        self._turnover[entries.number] = outgoing.numel() / indices.numel()
        indices.index_copy_(0, outgoing, incoming.to(indices.dtype))
        delta.index_fill_(0, outgoing, 0)
        if optimiser is not None:
            optimiser.replaced(delta, outgoing, seen)

    def _optimiser(self, trained: Sequence[Entries]) -> SparseOptimiser | None:
        """The optimiser, where it is one that is to be told, and trains these."""
        found = self.optimiser
        if isinstance(found, SparseOptimiser) and all(found.holds(e.tensor("delta")) for e in trained):
            return found
        return None

    def _first(self, what: str) -> bool:
        """Whether it has not been said yet."""
        first = what not in self._warned
        self._warned.add(what)
        return first


def _largest(scores: Tensor, count: int) -> Tensor:
    """The numbers of the largest scores, ascending; among equals the first."""
    return largest([lambda: scores], count)[0]


def _largest_sizes(values: Tensor, count: int) -> Tensor:
    """The numbers of the largest absolute values, ascending; among equals the first. `BLOCK` are looked at at a time,
    since they are those of a whole weight."""
    blocks = [values[start : start + BLOCK] for start in range(0, values.numel(), BLOCK)]
    found = largest([block.abs for block in blocks], count)
    return torch.cat([numbers + number * BLOCK for number, numbers in enumerate(found)])


def largest_products(region: WeightSlice, active: Tensor, rows: Tensor, columns: Tensor, count: int) -> Tensor:
    """The entries of a weight, of those that are not active, with the largest ``rows[i] * columns[j]``.

    Among equals the first are taken. They are worked out in blocks of rows, `BLOCK` at a time.

    Args:
        region: of which they are.
        active: indices of entries that do not count.
        rows, columns: factors for the rows and the columns of the tensor as it is stored, its last axis the columns.
        count: how many, if there are so many.

    Returns:
        Indices into the stored tensor, ``int64``, ascending.
    """
    rows, columns = rows.nan_to_num(0.0), columns.nan_to_num(0.0)  # infinite times zero is not a score
    width, device = columns.numel(), columns.device
    others = None
    if not region.whole:  # by row and column, of which one has a single value
        mask = ~region.mask(device)
        others = mask.expand(*region.shape[:-1], -1).reshape(-1, mask.shape[-1])
    taken = active.sort().values
    height = max(1, BLOCK // width)

    def products(start: int) -> Tensor:
        stop = min(start + height, rows.numel())
        found = torch.outer(rows[start:stop], columns)
        if others is not None:
            found.masked_fill_(others[start:stop], -torch.inf)
        edges = torch.tensor([start * width, stop * width], device=device, dtype=taken.dtype)
        low, high = torch.searchsorted(taken, edges).tolist()
        flat = found.view(-1)
        return flat.index_fill_(0, taken[low:high].long() - start * width, -torch.inf)

    starts = range(0, rows.numel(), height)
    found = largest([partial(products, start) for start in starts], min(count, region.size - active.numel()))
    return torch.cat([numbers + start * width for start, numbers in zip(starts, found, strict=True)])
