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
from torch import Tensor, fx

from graftc.compiler.folding.probing import Probe, Rounded
from graftc.compiler.folding.rounding import retained
from graftc.compiler.folding.site_tally import SiteTally
from graftc.passes.core.weights.folds import FoldGroup, LazyTensors
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
) -> tuple[list[tuple[fx.Node, SiteTally]], Retention]:
    """Fold a group of tensors, and probe them before and after the fold.

    Args:
        lazy: all tensors to fold.
        group: the tensors to fold now.
        probes: probes for the maps that read these tensors, and for tensors that no map reads.
        target: the destination for the folded tensors.

    Returns:
        The measurements at each site, each with the probed base node, and how much of all tensors' updates is left.
    """
    base = lazy.base(group)
    values = lazy.widened(base)
    others = {name for probe in probes for name in probe.reads} - values.keys()
    kept = {name: lazy.store.full(name).double() for name in others}

    def read(name: str) -> Tensor:
        tensors = values if name in values else kept
        return tensors[name] if name in tensors else lazy.store.full(name)

    pending = [(probe.node, probe.unfold(read, group.steps)) for probe in probes]
    lazy.apply(group, values)
    rounded = Rounded(added={name: value for name, value in values.items() if name not in base})
    for name, exact in values.items():
        if name not in base:
            base[name] = torch.zeros_like(exact)
        rounded.errors[name], left = target.put(name, exact, base[name])
        rounded.retained[name] = [left]
    total = Retention.total(left for (left,) in rounded.retained.values())
    rounded.retained.update(_by_site(group, rounded, base, values, target.tensors))
    return [(node, tally) for node, finish in pending for tally in finish(rounded)], total


def _by_site(group: FoldGroup, rounded: Rounded, *tensors: Mapping[str, Tensor]) -> dict[str, list[Retention]]:
    """Return how much of the update is left at each site: in its own rows of a weight, and in its bias."""
    left: dict[str, list[Retention]] = {}
    own = {(step.site, part.as_stored): part for step in group.steps for part in step.parts}
    for (site, _), part in own.items():
        if part.tensor in rounded.errors:  # false for a bias that did not have to be added
            whole = rounded.retained[part.tensor]
            parts = (part.take(each[part.tensor]) for each in tensors)
            left.setdefault(site, []).extend(whole if part.whole else [retained(*parts)])
    return left
