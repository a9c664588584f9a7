"""Folding with evidence: every base tensor that folding changes is folded once, probed, rounded, checked and released.

Tensors are processed one group at a time: those that are folded together, or read by one call. At any time, the group's
tensors are in memory in float64 before or while they are folded, and the same tensors afterwards: at most two tensors
of the largest one's size, except for what a method's own graph or fold allocates. Anything else that is large is
processed in pieces.

What the evidence shows. A linear map is run on `PROBES` random inputs, unfolded and folded; a table is looked up at
every entry (one of more than 2**26 numbers at 4,096 entries, and at as many of those that are replaced); a tensor that
belongs to no map is compared as a whole. Large results are multiplied by random vectors before they are compared. A
folded tensor that differs from the right one in any element changes such products with probability one; differences
below `ALGEBRA_BOUND` of the largest output count as rounding. Every element of the folded tensors is checked for
rounding to nearest, and the same pass measures how much of the update is left (`graftc.compiler.folding.retention`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from graftc.compiler.folding.evaluating import evaluate, evaluate_all
from graftc.compiler.folding.rounding import furthest, largest, retained, round_into
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import Use, linear_use
from graftc.passes.core.sites.uses import PROBES, Lookup
from graftc.passes.core.weights.folds import FoldGroup, LazyTensors
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.graph.remove_folded import added_bias
from graftc.records.certificate import Retention, SiteEvidence

LARGE = 2**21
"""Elements from which on outputs are looked up, and compared, in parts."""
Advance = Callable[[float], None]
"""Told how much of the work is done, from 0 to 1."""


@dataclass(frozen=True)
class Folded:
    """The result of folding.

    Attributes:
        tensors: the folded tensors by name, each in its base's element type, including biases that had to be added.
        additions: names of these biases.
        sites: the evidence, in the order of the graph.
        retention: how much of the updates of all tensors is left after rounding.
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
        base: the eval graph of the base.
        seed: the seed of the probes.
        advance: called with the fraction of the work that is done.
    """
    adapted = Adapted(unfolded)
    uses: list[tuple[int, Use]] = []
    readers: dict[str, tuple[int, fx.Node]] = {}
    for at, node in enumerate(base.graph.nodes):
        if node.op == "get_attr" and lazy.chain(str(node.target)):
            readers.setdefault(str(node.target), (at, node))
        elif (use := linear_use(node)) is not None and any(lazy.chain(name) for name in _tensors_of(use)):
            uses.append((at, use))
    groups = lazy.groups((*_tensors_of(use), *use.addend_tensors) for _, use in uses)
    group_of = {name: index for index, group in enumerate(groups) for name in group.names}
    uses_of: dict[int, list[tuple[int, Use]]] = {}
    for at, use in uses:
        index = next(group_of[name] for name in _tensors_of(use) if name in group_of)
        uses_of.setdefault(index, []).append((at, use))
    work = [sum(lazy.store.get(n).numel() for n in group.names if n in lazy.store) for group in groups]
    done = list(itertools.accumulate(work))
    tensors: dict[str, Tensor] = {}
    evidence: list[tuple[int, SiteEvidence]] = []
    retention = Retention()
    for index, group in enumerate(groups):
        folded = _Group(adapted, lazy, group, uses_of.get(index, []), readers, seed)
        evidence += folded.evidence
        tensors |= folded.rounded
        retention += folded.retention
        advance(done[index] / max(done[-1], 1))
    order = [name for group in groups for name in group.names]
    additions = tuple(name for name in order if name in tensors and name not in lazy.store)
    sites = tuple(item for _, item in sorted(evidence, key=lambda pair: pair[0]))
    return Folded(tensors, additions, sites, retention)


def _tensors_of(use: Use) -> tuple[str, str]:
    """Return the names of a map's weight and bias; without a bias, the name of one that folding would add."""
    return use.weight.tensor, added_bias(use.node) if use.bias is None else use.bias.tensor


class Adapted:
    """The nodes of the adapted graph that correspond to nodes of the base.

    Args:
        program: the adapted graph.
    """

    def __init__(self, program: Program) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._edits = program.edits

    def stages(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that represent a base node's value, from before any edit to after the last."""
        nodes = [self._edits.original(self._nodes[node.name])]
        while (edit := self._edits.replacement(nodes[-1])) is not None:
            nodes.append(edit.after)
        return nodes

    def kept(self, node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node | None:
        """Return the adapted graph's node that computes what a base node does, from the same inputs and base tensors.

        None if it reads anything else there.
        """
        counterpart = self._nodes[node.name]
        for mine, theirs in zip(counterpart.all_input_nodes, node.all_input_nodes, strict=False):
            known = mine in inputs or mine.op == "get_attr"
            if not known or (mine.name, mine.target) != (theirs.name, theirs.target):
                return None
        return counterpart if len(counterpart.all_input_nodes) == len(node.all_input_nodes) else None

    def last(self, node: fx.Node) -> fx.Node:
        """Return the node that represents a base node after every edit."""
        return self._edits.current(self._nodes[node.name])


class _Group:
    """Tensors that are folded together.

    Attributes:
        evidence: the evidence, with places in the graph.
        rounded: the folded and rounded tensors, by name.
        retention: how much of the updates of all of them is left after rounding.
    """

    def __init__(
        self,
        adapted: Adapted,
        lazy: LazyTensors,
        group: FoldGroup,
        uses: list[tuple[int, Use]],
        readers: dict[str, tuple[int, fx.Node]],
        seed: int,
    ) -> None:
        self.lazy, self.adapted, self.group = lazy, adapted, group
        base = lazy.base(group)
        self.values = lazy.widened(base)
        read = {own.tensor for _, use in uses for own in (use.weight, use.bias) if own is not None}
        self.kept = {name: lazy.store.full(name).double() for name in read - self.values.keys()}
        probes = [(at, _Probe(self, use, seed)) for at, use in uses]
        lone = [name for name in group.names if name in readers and name not in read]
        stand_ins = {name: _StandIn(self, name, readers[name][1], seed) for name in lone}
        lazy.apply(group, self.values)
        rounding: dict[str, float] = {}
        self.rounded: dict[str, Tensor] = {}
        self.retained: dict[str, Retention] = {}
        for name, exact in self.values.items():
            into = torch.empty(exact.shape, dtype=lazy.dtype(name), device=exact.device)
            base.setdefault(name, torch.zeros_like(into))
            rounding[name], self.retained[name] = round_into(into, exact, base[name])
            self.rounded[name] = into
        self.retention = Retention.total(self.retained.values())
        self.retained |= self._by_site(base)
        self.evidence = [(at, item) for at, probe in probes for item in probe.evidence(rounding)]
        self.evidence += [(readers[name][0], stand_ins[name].evidence(rounding[name])) for name in lone]
        del self.values, self.kept

    def _by_site(self, base: dict[str, Tensor]) -> dict[str, Retention]:
        """Return what is left of the update at each site: of its own rows of a weight, and of its bias."""
        left: dict[str, Retention] = {}
        own = {(step.site, part.as_stored): part for step in self.group.steps for part in step.parts}
        for (site, _), part in own.items():
            name = part.tensor
            if name not in self.values:  # a bias that did not have to be added
                continue
            mine = self.retained[name]
            if not part.whole:
                mine = retained(*(part.take(tensors[name]) for tensors in (base, self.values, self.rounded)))
            left[site] = left.get(site, Retention()) + mine
        return left

    def tensor(self, name: str) -> Tensor:
        """Return a tensor in its current state: the base's, or the folded one."""
        for tensors in (self.values, self.kept):
            if name in tensors:
                return tensors[name]
        return self.lazy.store.full(name)


class _Probe:
    """One map, unfolded and folded, on the same random inputs in float64.

    Unfolded, the adapted graph between the map's input and its last result runs with the base's tensors and the
    adapters. Folded, the base's own call runs with the folded tensors.
    """

    def __init__(self, group: _Group, use: Use, seed: int) -> None:
        self.group, self.use, self.lazy, self.store = group, use, group.lazy, group.lazy.store
        self.device = self.store.get(use.weight.tensor).device
        generator = torch.Generator().manual_seed(seed)
        probes = {node: value.to(self.device) for node, value in use.probe(generator).items()}
        self.inputs = {node: self._with_replaced(value) for node, value in probes.items()}
        self.spans = self._spans()
        entries = sum(value.shape[-1] for value in self.inputs.values()) * use.out_features
        self.random = isinstance(use, Lookup) and entries > LARGE
        self.vectors = _vectors(use.out_features, generator, self.device) if self.random else None
        self.unfolded: list[list[Tensor]] = []
        self.changes = [0.0] * (len(self.spans) + 1)
        for inputs in self._parts():
            seen, before = map(self._seen, self._unfolded_and_base(inputs))
            self.changes = [largest(c, furthest(*pair)) for c, *pair in zip(self.changes, seen, before, strict=True)]
            self.unfolded.append(seen)

    def _unfolded_and_base(self, inputs: dict[fx.Node, Tensor]) -> tuple[Tensor, Tensor]:
        """Return the results of the map in the adapted graph and in the base's."""
        adapted, node, tensor = self.group.adapted, self.use.node, self.group.tensor
        values = {stage: value for source, value in inputs.items() for stage in adapted.stages(source)}
        kept = adapted.kept(node, values)
        if kept is not None:
            unfolded, base = evaluate_all((adapted.last(node), kept), values, tensor)
            return unfolded, base
        return evaluate(adapted.last(node), values, tensor), evaluate(node, inputs, tensor)

    def _with_replaced(self, probe: Tensor) -> Tensor:
        """Add some of the replaced entries to the probe of a table that is too large to be looked up in full."""
        if not isinstance(self.use, Lookup) or probe.numel() == self.use.in_features:
            return probe
        table = self.use.weight
        entries = [
            s.weight for s in self.lazy.chain(table.tensor) if s.weight.axis != table.axis and not s.weight.whole
        ]
        if not entries:
            return probe
        replaced = torch.cat([own.index(probe.device) for own in entries])[: probe.numel()]
        return torch.cat([probe, replaced.expand(*probe.shape[:-1], -1)], -1)

    def _parts(self) -> Iterator[dict[fx.Node, Tensor]]:
        """Yield the inputs: all at once, or some entries of a large table at a time."""
        if not self.random:
            yield self.inputs
            return
        ((node, numbers),) = self.inputs.items()
        for part in torch.split(numbers, max(1, LARGE // self.use.out_features), -1):
            yield {node: part}

    def _spans(self) -> list[tuple[str, tuple[str, ...], Tensor]]:
        """Return each site of the map with the adaptations that fold there and its own columns of the result."""
        use = self.use
        mine = {own.tensor for own in (use.weight, use.bias) if own is not None}
        steps = [step for step in self.group.group.steps if step.weight.tensor in mine]
        adaptations: dict[str, dict[str, None]] = {}
        for step in steps:
            adaptations.setdefault(step.site, {})[step.adaptation] = None
        # Equal rows of a weight and of its bias count once.
        distinct = {(s.site, s.weight.layout, s.weight.total, s.weight.rows): s.weight for s in steps}
        slices = [(site, own) for (site, *_), own in distinct.items()] or [(use.weight.tensor, use.weight)]
        columns = ((site, self._columns(own)) for site, own in slices)
        return [(site, tuple(adaptations.get(site, ())), own) for site, own in columns if own is not None]

    def _columns(self, changed: WeightSlice) -> Tensor | None:
        """Return the result's columns that rows of the weight or bias produce; None if this use does not read them."""
        weight = self.use.weight
        if changed.axis != weight.axis:  # inputs of the map, or experts: any column may change
            return torch.arange(weight.count, device=self.device)
        own = weight.at(changed.rows)
        return own.within(weight).index(self.device) if weight.covers(own) else None

    def _seen(self, output: Tensor) -> list[Tensor]:
        """Return the compared parts of an output: every site's columns and all columns, or random sums of these."""
        axis = self.use.axis
        parts = (own for _, _, own in self.spans)
        compared = [output if len(own) == output.shape[axis] else output.index_select(axis, own) for own in parts]
        compared.append(output)
        return compared if self.vectors is None else [part @ self.vectors[: part.shape[-1]] for part in compared]

    def evidence(self, rounding: dict[str, float]) -> list[SiteEvidence]:
        """Return the evidence for each site of the map, given the largest rounding errors by tensor."""
        use = self.use
        ulps = largest(*(rounding.get(name, 0.0) for name in _tensors_of(use)))
        scale = largest(1e-30, *(float(seen[-1].abs().max()) for seen in self.unfolded))
        errors = [0.0] * (len(self.spans) + 1)
        for inputs, before in zip(self._parts(), self.unfolded, strict=True):
            seen = self._seen(self._with_added_bias(evaluate(use.node, inputs, self.group.tensor)))
            errors = [largest(e, furthest(*pair)) for e, *pair in zip(errors, before, seen, strict=True)]
        *own, worst = (error / scale for error in errors)
        sites = [
            SiteEvidence(site, names, change, error, ulps, self.group.retained[site])
            for (site, names, _), change, error in zip(self.spans, self.changes[:-1], own, strict=True)
        ]
        # Rows that no site owns must not have changed: this also detects a fold that writes to the wrong rows.
        if not sites:
            return [SiteEvidence(use.weight.tensor, (), self.changes[-1], worst, ulps, Retention())]
        if not worst <= largest(*own):
            sites[0] = replace(sites[0], algebra=worst)
        return sites

    def _with_added_bias(self, folded: Tensor) -> Tensor:
        name = added_bias(self.use.node)
        if self.use.bias is not None or name in self.store or name not in self.group.values:
            return folded
        return folded.movedim(self.use.axis, -1).add(self.group.values[name]).movedim(-1, self.use.axis)


class _StandIn:
    """A tensor that belongs to no linear map: its replacement in float64 against the folded tensor.

    The replacement is what the adapted graph computes instead of it.
    """

    def __init__(self, group: _Group, name: str, node: fx.Node, seed: int) -> None:
        self.group, self.name = group, name
        base = group.tensor(name)
        generator = torch.Generator().manual_seed(seed)
        self.vectors = _vectors(base.shape[-1], generator, base.device) if base.numel() > LARGE else None
        self.unfolded = self._seen(evaluate(group.adapted.last(node), {}, group.tensor))
        self.change = furthest(self.unfolded, self._seen(base))

    def _seen(self, value: Tensor) -> Tensor:
        return value if self.vectors is None else value @ self.vectors

    def evidence(self, rounding: float) -> SiteEvidence:
        """Return the evidence of the comparison."""
        scale = largest(1e-30, float(self.unfolded.abs().max()) if self.unfolded.numel() else 0.0)
        error = furthest(self.unfolded, self._seen(self.group.tensor(self.name)))
        adaptations = tuple(dict.fromkeys(s.adaptation for s in self.group.lazy.chain(self.name)))
        retained = self.group.retained[self.name]
        return SiteEvidence(self.name, adaptations, self.change, error / scale, rounding, retained)


def _vectors(width: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return `PROBES` random vectors, as columns."""
    return torch.randn(width, PROBES, generator=generator, dtype=torch.float64).to(device)
