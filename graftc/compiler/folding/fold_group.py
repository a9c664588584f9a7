"""Fold one group of tensors with evidence: probe, fold, round, and probe again.

This works in the same way for tensors from a model and from files, wherever the results go. At any time, memory holds
the group's tensors in float64 (before or during the fold) and the results that the target keeps, apart from
allocations by a method's own graph or fold.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from graftc.compiler.folding.probing import Probe
from graftc.compiler.folding.rounding import largest_change, round_into
from graftc.compiler.folding.site_tally import SiteTally
from graftc.passes.core.weights.folds import FoldGroup, LazyTensors
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.retention import Retention


class FoldTarget(ABC):
    """A destination for a group's folded tensors.

    Attributes:
        tensors: the rounded tensors that it keeps, by name. A tensor must be kept if a site has only some of its rows.
    """

    tensors: Mapping[str, Tensor] = MappingProxyType({})

    @abstractmethod
    def put(self, name: str, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        """Round a tensor once.

        Args:
            name: the tensor's name.
            exact: its folded values, in float64.
            base: its values before folding.

        Returns:
            The largest error, in units in the last place, and how much of the update is left.
        """


def fold_group(
    lazy: LazyTensors, group: FoldGroup, probes: Sequence[Probe], target: FoldTarget
) -> tuple[dict[str, SiteTally], Retention]:
    """Fold a group of tensors, and probe them before and after the fold.

    Trained copies are put in place first, and their change is that of the stored values; what everything else changes
    is measured on top of them. Errors are measured against the adapted graph over the base's own values.

    Args:
        lazy: all tensors to fold.
        group: the tensors to fold now.
        probes: probes for the maps that read these tensors, and for tensors that no map reads.
        target: the destination for the folded tensors.

    Returns:
        The measurements by site, and how much of all tensors' updates is left.
    """
    base = lazy.base(group)
    values = lazy.widened(base)
    others = {name for probe in probes for name in probe.reads} - values.keys()
    kept = {name: lazy.store.full(name).double() for name in others}

    def read(name: str) -> Tensor:
        tensors = values if name in values else kept
        return tensors[name] if name in tensors else lazy.store.full(name)

    unfolded = [probe.unfold(read, group.steps) for probe in probes]
    copies = [step for step in group.steps if step.copies]
    lazy.apply(copies, values)
    tallies: dict[str, SiteTally] = {}
    for step in copies:
        change = largest_change(*(step.weight.take(each[step.weight.tensor]) for each in (base, values)))
        add_tally(tallies, SiteTally(step.site, (step.adaptation,), change))
    vectors = {name: values[name].clone() for step in copies for name in step.tensors if values[name].dim() == 1}
    pending = [start() for start in unfolded]
    lazy.apply((step for step in group.steps if not step.copies), values)
    added = {name: value for name, value in values.items() if name not in base}
    for tally in (tally for finish in pending for tally in finish(added)):
        add_tally(tallies, tally)
    base |= {name: torch.zeros_like(value) for name, value in added.items()}
    stored = {name: target.put(name, exact, base[name]) for name, exact in values.items()}
    done: set[tuple[str, WeightSlice]] = set()
    parts_of = ((step, part) for step in group.steps for part in step.parts if part.tensor in stored)
    for step, part in parts_of:
        name, known = part.tensor, (step.site, part.as_stored)
        # A copied bias belongs to a step of its own, unless another step changes it as well.
        copied = not step.copies and name in vectors and torch.equal(part.take(vectors[name]), part.take(values[name]))
        if known not in done and not copied:
            done.add(known)
            parts = (part.take(each[name]) for each in (target.tensors, values, base)) if not part.whole else ()
            rounding, left = stored[name] if part.whole else round_into(*parts, writes=False)
            add_tally(tallies, SiteTally(step.site, (), rounding=rounding, retained=left))
    return tallies, Retention.total(left for _, left in stored.values())


def add_tally(tallies: dict[str, SiteTally], tally: SiteTally) -> None:
    """Add measurements to those of the same site."""
    known = tallies.get(tally.site)
    tallies[tally.site] = tally if known is None else known + tally
