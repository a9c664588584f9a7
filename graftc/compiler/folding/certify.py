"""Fold with evidence: each base tensor that folding changes is folded once, probed, rounded, checked and released.

Tensors are processed one group at a time (`graftc.compiler.folding.fold_group`); a group contains tensors that are
folded together or read by one call. At any time, memory holds the group's tensors in float64 (before or during the
fold) and the folded tensors: at most two tensors of the size of the largest, apart from allocations by a method's own
graph or fold. All other large values are processed in pieces.

The evidence is collected as follows. A linear map is run on `PROBES` random inputs, unfolded and folded. A table is
looked up at every entry; a table with more than 2**26 elements is looked up at 4,096 entries and at up to 4,096
replaced ones. A tensor that belongs to no map is compared as a whole. Large results are multiplied by random vectors
before they are compared: if a folded tensor is wrong in any element, these products differ with probability one.
Differences below `ALGEBRA_BOUND` of the largest output count as rounding. Every element of the folded tensors is
checked to have been rounded to nearest, and the same pass measures how much of the update is left
(`graftc.compiler.folding.retention`).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graftc.compiler.folding.fold_group import FoldTarget, fold_group
from graftc.compiler.folding.probing import AdaptedGraph, MapProbe, Probe, TensorProbe, tensors_of
from graftc.compiler.folding.rounding import round_into
from graftc.compiler.folding.site_tally import SiteTally
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import Use, linear_use
from graftc.passes.core.weights.folds import FoldStep, LazyTensors
from graftc.records.certificate import SiteEvidence
from graftc.records.retention import Retention

Advance = Callable[[float], None]
"""Receives the completed fraction of the work, from 0 to 1."""


@dataclass(frozen=True)
class Folded:
    """The result of folding.

    Attributes:
        tensors: the folded tensors by name, each in its base's dtype, including biases that had to be added.
        additions: names of these biases.
        sites: the evidence, in the order in which the graph reads the tensors.
        retention: how much of all tensors' updates is left after rounding.
    """

    tensors: dict[str, Tensor]
    additions: tuple[str, ...]
    sites: tuple[SiteEvidence, ...]
    retention: Retention


def fold_tensors(
    lazy: LazyTensors,
    unfolded: Program,
    base: Program,
    seed: int = 0,
    advance: Advance = lambda _: None,
) -> Folded:
    """Fold every tensor, probe every map that this changes, and compare every other folded tensor with its replacement.

    Args:
        lazy: the tensors to fold.
        unfolded: the eval graph with only the adaptations that fold.
        base: the base's eval graph.
        seed: the seed for the probes.
        advance: called with the completed fraction of the work.
    """
    uses: list[Use] = []
    readers: dict[str, fx.Node] = {}
    for node in base.graph.nodes:
        if node.op == "get_attr" and lazy.chain(str(node.target)):
            readers.setdefault(str(node.target), node)
        elif (use := linear_use(node)) is not None and any(lazy.chain(name) for name in tensors_of(use)):
            uses.append(use)
    groups = lazy.groups((*tensors_of(use), *use.addend_tensors) for use in uses)
    group_of = {name: index for index, group in enumerate(groups) for name in group.names}
    uses_of: dict[int, list[Use]] = defaultdict(list)
    for use in uses:
        uses_of[next(group_of[name] for name in tensors_of(use) if name in group_of)].append(use)
    work = [sum(lazy.store.get(n).numel() for n in group.names if n in lazy.store) for group in groups]
    done = list(itertools.accumulate(work))
    graph, target, retention = AdaptedGraph(unfolded), _InMemory(lazy), Retention()
    tallies: dict[str, SiteTally] = {}
    for index, group in enumerate(groups):
        probes: list[Probe] = []
        for use in uses_of[index]:
            device = lazy.store.get(use.weight.tensor).device
            probes.append(MapProbe(graph, use, device, seed, _replaced_entries(use, group.steps, device)))
        read = {name for probe in probes for name in probe.reads}
        lone = (name for name in group.names if name in readers and name not in read)
        probes += [TensorProbe(graph, readers[name], lazy.store.get(name), seed) for name in lone]
        measured, left = fold_group(lazy, group, probes, target)
        tallies |= measured
        retention += left
        advance(done[index] / max(done[-1], 1))
    order = [name for group in groups for name in group.names]
    additions = tuple(name for name in order if name in target.tensors and name not in lazy.store)
    places = {name: index for index, name in enumerate(readers)}
    read_at = {step.site: places[step.weight.tensor] for step in reversed(lazy.steps) if step.weight.tensor in places}
    sites = tuple(tallies[site].evidence for site in sorted(tallies, key=lambda site: read_at.get(site, len(places))))
    return Folded(target.tensors, additions, sites, retention)


class _InMemory(FoldTarget):
    """Keeps all tensors, each in its base's dtype."""

    def __init__(self, lazy: LazyTensors) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._dtype = lazy.dtype

    def put(self, name: str, exact: Tensor, base: Tensor) -> tuple[float, Retention]:
        self.tensors[name] = torch.empty(exact.shape, dtype=self._dtype(name), device=exact.device)
        return round_into(self.tensors[name], exact, base)


def _replaced_entries(use: Use, steps: Sequence[FoldStep], device: torch.device) -> Tensor | None:
    """Return the entries of a table that are replaced along a different axis from its rows; None if there are none."""
    table = use.weight
    chain = (step.weight for step in steps if table.tensor in step.tensors)
    entries = [own.index(device) for own in chain if own.axis != table.axis and not own.whole]
    return torch.cat(entries) if entries else None
