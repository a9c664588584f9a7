"""Fold one site of a checkpoint block by block into a target, and gather evidence along the way."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.fold_group import FoldTarget, add_tally, fold_group
from graftc.compiler.folding.one_map import BIAS, WEIGHT, OneMap
from graftc.compiler.folding.probing import Probe
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
from graftc.records.certificate import SiteEvidence
from graftc.records.retention import Retention
from graftc.runtime.streaming.merge_plan import MergePlan
from graftc.runtime.streaming.sites import FileSite
from graftc.runtime.streaming.update import Replacement, SiteUpdate, rows_of
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


@dataclass
class Folds:
    """The measurements of folding so far.

    Attributes:
        tallies: the measurements by site.
        changed: the slices that were folded.
        retention: how much of all updates is left.
    """

    tallies: dict[str, SiteTally] = field(default_factory=dict)
    changed: list[WeightSlice] = field(default_factory=list)
    retention: Retention = field(default_factory=Retention)

    def add(self, other: Folds) -> None:
        """Add what else was measured."""
        for tally in other.tallies.values():
            add_tally(self.tallies, tally)
        self.changed += other.changed
        self.retention += other.retention

    @property
    def evidence(self) -> tuple[SiteEvidence, ...]:
        """The evidence for every site."""
        return tuple(tally.evidence for tally in self.tallies.values())


class RowFold(FoldTarget):
    """Folds some rows of a checkpoint's tensors as one group.

    Args:
        target: the destination of the rows; rows of tensors that it does not contain are skipped.
        slices: by the tensors' names in the group, the rows in the checkpoint and in the group.
        site: the name of the site, for messages.
    """

    def __init__(self, target: RowTarget, slices: Mapping[str, tuple[WeightSlice, WeightSlice]], site: str) -> None:
        self._target, self._slices, self._site = target, slices, site
        self._changed: list[WeightSlice] = []

    def fold(self, store: Store, steps: Sequence[FoldStep], probes: Sequence[Probe]) -> Folds:
        """Return what folding measures; nothing unless the target contains a tensor that changes.

        Args:
            store: the base's rows, and the tensors that the probes read.
            steps: the steps that change the rows.
            probes: probes for the maps that read them.
        """
        group = FoldGroup(tuple(dict.fromkeys(name for step in steps for name in step.tensors)), tuple(steps))
        tallies, left = fold_group(LazyTensors(store, steps), group, probes, self)
        return Folds(tallies, self._changed, left) if self._changed else Folds()

    def put(self, name: str, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        """Put rows into the target, unless it does not contain their tensor or they are a bias that does not change.

        Raises:
            GraftError: GC103 for a bias that the site does not have.
        """
        if name not in self._slices:
            raise GraftError("GC103", f"the fold needs a bias, but {self._site} has none")
        own, mine = self._slices[name]
        if own.tensor not in self._target or (name == BIAS and torch.equal(exact, base)):
            return 0.0, Retention()
        self._changed.append(own)
        return self._target.put(own, mine.oriented(exact), mine.oriented(base))


def fold_copy(plan: MergePlan, copy: Replacement, rows: WeightSlice, target: RowTarget) -> Folds:
    """Replace rows of a tensor by those of a trained copy, and return what was measured."""
    name, store = copy.tensor, Store()
    store.put(name, rows_of(rows, plan.checkpoint[name]))
    own = WeightSlice.every(name, store.get(name))
    return RowFold(target, {name: (rows, own)}, copy.site).fold(store, [copy.step(own, rows)], [])


class SiteFold:
    """The fold of one site.

    Args:
        plan: the merge.
        site: the site.
        target: the destination of the rows.

    Attributes:
        site: as passed in.
    """

    def __init__(self, plan: MergePlan, site: FileSite, target: RowTarget) -> None:
        self._plan, self.site, self._target = plan, site, target
        self._parts: dict[str, dict[str, Tensor]] = {}

    def fold(self) -> Folds:
        """Fold block by block, and return what was measured.

        Raises:
            GraftError: GC050 if an adaptation cannot fold, GC071 for a faulty method, GC103 for an adaptation that
                changes anything other than the site's rows or its existing bias.
        """
        folds = Folds()
        for start, own in self.site.weight.blocks(self.site.rows_per_block):
            folds.add(self._folded(start, own))
        self._parts.clear()
        return folds

    def _folded(self, start: int, own: WeightSlice) -> Folds:
        """Fold rows of the site, beginning at ``start``."""
        plan, site, store = self._plan, self.site, Store()
        one = plan.block(site, own.count)
        slices = (each.at(own.rows) for each in site.slices)
        pairs = dict(zip((WEIGHT, BIAS), zip(slices, one.slices, strict=False), strict=False))
        for name, (rows, mine) in pairs.items():
            store.put(name, mine.restored(rows_of(rows, plan.checkpoint[rows.tensor])))
        copies = ((plan.replacements.get(rows.tensor), rows, mine) for rows, mine in pairs.values())
        steps = [copy.step(mine, rows) for copy, rows, mine in copies if copy is not None]
        steps += [self._step(update, one, start, pairs[WEIGHT][0], store) for update in site.updates]
        return RowFold(self._target, pairs, site.name).fold(store, steps, [one.probe])

    def _step(self, update: SiteUpdate, one: OneMap, start: int, rows: WeightSlice, store: Store) -> FoldStep:
        """Add the tensors that an update's unfolded graph reads to a Store, and return the update's fold of a block."""
        method: Any = method_for(update.spec.method)
        parts = self._cut(update, start, rows.count)
        every = {**self._constants(update, rows), **parts}
        for name, own in one.parts.items():
            if own.adaptation == update.adaptation:
                store.put(name, every[own.part])
        fold = fold_at(method, update.spec, replace(one.site, key=SiteKey("", update.site)), parts)
        if isinstance(fold, Keep):
            raise GraftError("GC050", f"{update.adaptation!r} cannot fold at {update.site}: {fold.reason}")
        if not isinstance(fold, WeightFold):
            raise GraftError("GC103", f"{update.adaptation!r} does not fold into the rows of {update.site}")
        return FoldStep(update.adaptation, self.site.name, *one.slices, fold.apply)

    def _constants(self, update: SiteUpdate, rows: WeightSlice) -> Mapping[str, Tensor]:
        """Return the constants that an update's graph has for rows of the weight, by part."""
        method = method_for(update.spec.method)
        if not isinstance(method, RowWise) or type(method).from_weight is RowWise.from_weight:
            return {}
        return method.from_weight(update.spec, rows_of(rows, self._plan.current(rows.tensor)).double())

    def _cut(self, update: SiteUpdate, start: int, count: int) -> dict[str, Tensor]:
        """Return an update's tensors for a block of rows, with floating-point ones in float64."""
        method = method_for(update.spec.method)
        axes = method.row_axes(update.spec) if isinstance(method, RowWise) else {}
        if update.adaptation not in self._parts:
            self._parts[update.adaptation] = {p: t if p in axes else _widened(t) for p, t in update.read().items()}
        tensors = self._parts[update.adaptation]
        return {p: _widened(t.narrow(axes[p], start, count)) if p in axes else t for p, t in tensors.items()}


def _widened(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor
