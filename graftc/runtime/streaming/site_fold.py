"""Fold one site of a checkpoint block by block into a target, and gather evidence along the way."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.fold_group import FoldTarget, fold_group
from graftc.compiler.folding.one_map import BIAS, WEIGHT, OneMap
from graftc.compiler.folding.rounding import largest, round_into
from graftc.compiler.folding.site_tally import SiteTally
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.mapped import DTYPES
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.folding import fold_at
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import SiteKey
from graftc.passes.core.weights.folds import FoldGroup, FoldStep, Keep, LazyTensors, WeightFold
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.retention import Retention
from graftc.runtime.streaming.merge_plan import MergePlan
from graftc.runtime.streaming.sites import FileSite
from graftc.runtime.streaming.update import SiteUpdate
from graftc.specs.errors.diagnostics import GraftError


class RowTarget:
    """The destination of folded rows: files to write, files to compare with, or none.

    Args:
        names: names of the tensors that the target contains.
        tensors: the files; None to measure only.
        writes: whether to write to the files.
        dtypes: dtypes by tensor, needed if there are no files.
    """

    def __init__(
        self,
        names: Collection[str],
        tensors: TensorFolder | None,
        *,
        writes: bool = False,
        dtypes: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._names, self._tensors, self._writes, self._dtypes = names, tensors, writes, dtypes

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def put(self, own: WeightSlice, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        """Round rows once and store them, or compare them with the stored rows if the files are not written.

        Args:
            own: the rows and the tensor to which they belong.
            exact: their folded values, ``float64[rows, in]``, or ``[rows]`` for a bias.
            base: their values before folding.

        Returns:
            The largest error of the stored values, in units in the last place, and how much of the update is left.
        """
        if self._tensors is None:
            return round_into(torch.empty_like(exact, dtype=DTYPES[self._dtypes[own.tensor]]), exact, base)
        views = own.views(self._tensors[own.tensor])
        sizes = [view.shape[own.row_axis] for view in views]
        parts = zip(views, torch.split(exact, sizes, own.row_axis), torch.split(base, sizes, own.row_axis), strict=True)
        errors, retained = zip(*(round_into(*part, writes=self._writes) for part in parts), strict=True)
        return largest(*errors), Retention.total(retained)


class SiteFold(FoldTarget):
    """The fold of one site.

    Args:
        plan: the merge.
        site: the site.
        target: the destination of the rows; rows of tensors that it does not contain are skipped.

    Attributes:
        tally: the measurements so far.
        changed: the slices in the target that the fold has changed so far.
    """

    def __init__(self, plan: MergePlan, site: FileSite, target: RowTarget) -> None:
        self._plan, self._site, self._target = plan, site, target
        self._slices: Mapping[str, tuple[WeightSlice, WeightSlice]] = {}  # in the files, and in the map
        self._parts: dict[str, dict[str, Tensor]] = {}
        self.tally = SiteTally(site.name, site.adaptations)
        self.changed = [site.weight] if site.weight.tensor in target else []

    def blocks(self) -> Iterator[int]:
        """Fold block by block, and yield the number of entries in each.

        Raises:
            GraftError: GC050 if an adaptation cannot fold, GC071 for a faulty method, GC103 for an adaptation that
                changes anything other than the site's rows or its existing bias.
        """
        site = self._site
        stored = {own.tensor: self._plan.current(own.tensor) for own in site.slices}
        for start, own in site.weight.blocks(site.rows_per_block):
            self.tally += self._folded(start, own, stored)
            yield own.size

    def _folded(self, start: int, own: WeightSlice, stored: Mapping[str, Tensor]) -> SiteTally:
        """Fold rows of the site, beginning at ``start``, and return the measurements."""
        site, one, store = self._site, self._plan.block(self._site, own.count), Store()
        slices = (each.at(own.rows) for each in site.slices)
        self._slices = dict(zip((WEIGHT, BIAS), zip(slices, one.slices, strict=False), strict=False))
        rows = {name: rows_of(each, stored[each.tensor]) for name, (each, _) in self._slices.items()}
        for name, values in rows.items():
            store.put(name, self._slices[name][1].restored(values))
        steps = [self._step(update, one, start, rows[WEIGHT], store) for update in site.updates]
        group = FoldGroup((WEIGHT, BIAS), tuple(steps))
        ((_, tally),), _ = fold_group(LazyTensors(store, steps), group, [one.probe], self)
        return tally

    def put(self, name: str, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        """Put rows into the target, unless it does not contain their tensor or they are a bias that does not change.

        Raises:
            GraftError: GC103 for a bias that the site does not have.
        """
        if name not in self._slices:
            message = f"{self._site.adaptations[-1]!r} needs a bias, but {self._site.name} has none"
            raise GraftError("GC103", message)
        own, mine = self._slices[name]
        if own.tensor not in self._target or (name == BIAS and torch.equal(exact, base)):
            return 0.0, Retention()
        self.changed += [own] if name == BIAS else []
        return self._target.put(own, mine.oriented(exact), mine.oriented(base))

    def _step(self, update: SiteUpdate, one: OneMap, start: int, rows: Tensor, store: Store) -> FoldStep:
        """Add the tensors that an update's unfolded graph reads to a Store, and return the update's fold of a block."""
        method: Any = method_for(update.spec.method)
        parts = self._cut(update, start, len(rows))
        every = {**(method.from_weight(update.spec, rows) if isinstance(method, RowWise) else {}), **parts}
        for name, own in one.parts.items():
            if own.adaptation == update.adaptation:
                store.put(name, every[own.part])
        fold = fold_at(method, update.spec, replace(one.site, key=SiteKey("", update.site)), parts)
        if isinstance(fold, Keep):
            raise GraftError("GC050", f"{update.adaptation!r} cannot fold at {update.site}: {fold.reason}")
        if not isinstance(fold, WeightFold):
            raise GraftError("GC103", f"{update.adaptation!r} does not fold into the rows of {update.site}")
        return FoldStep(update.adaptation, self._site.name, *one.slices, fold.apply)

    def _cut(self, update: SiteUpdate, start: int, count: int) -> dict[str, Tensor]:
        """Return an update's tensors for a block of rows, with floating-point ones in float64."""
        method = method_for(update.spec.method)
        axes = method.row_axes(update.spec) if isinstance(method, RowWise) else {}
        if update.adaptation not in self._parts:
            self._parts[update.adaptation] = {p: t if p in axes else _widened(t) for p, t in update.read().items()}
        tensors = self._parts[update.adaptation]
        return {p: _widened(t.narrow(axes[p], start, count)) if p in axes else t for p, t in tensors.items()}


def rows_of(own: WeightSlice, stored: Tensor) -> Tensor:
    """Return a float64 copy of a slice's rows, as the map uses them."""
    views = own.views(stored)
    return (views[0] if len(views) == 1 else torch.cat(views, own.row_axis)).to(torch.float64, copy=True)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
