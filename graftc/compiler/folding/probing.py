"""Probes: compare a value in float64 before and after a fold, on the same inputs.

Unfolded, the adapted graph's nodes run with the base's tensors and the adapters. Folded, the base's own nodes run with
the folded tensors.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, fx

from graftc.compiler.folding.evaluating import evaluate, evaluate_all
from graftc.compiler.folding.rounding import furthest, largest, size
from graftc.compiler.folding.site_tally import SiteTally
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import Use
from graftc.passes.core.sites.uses import PROBES, Lookup
from graftc.passes.core.weights.folds import FoldStep
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.passes.graph.remove_folded import added_bias

LARGE = 2**21
"""Number of elements above which outputs are looked up in parts, and compared through random vectors."""
Read = Callable[[str], Tensor]
"""Returns a tensor's current values by name: the base's, or the folded ones."""


class AdaptedGraph:
    """Finds the adapted graph's nodes that correspond to nodes of the base.

    Args:
        program: the adapted graph.
        copies: whether it reads trained copies, if there are any; otherwise it is computed over tensors that contain
            them.

    Attributes:
        copies: as passed in.
    """

    def __init__(self, program: Program, *, copies: bool = True) -> None:
        self.copies = copies
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._edits = program.edits

    def stages(self, node: fx.Node) -> list[fx.Node]:
        """Return the nodes that represent a base node's value, from before the first edit to after the last."""
        nodes = [self._edits.original(self._nodes[node.name])]
        while (edit := self._edits.replacement(nodes[-1])) is not None:
            nodes.append(edit.after)
        return nodes

    def kept(self, node: fx.Node, inputs: Collection[fx.Node]) -> fx.Node | None:
        """Return the adapted graph's counterpart of a base node if it reads the same inputs and base tensors.

        None if it reads anything else.
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


Finish = Callable[[Mapping[str, Tensor]], list[SiteTally]]
"""Computes a probe's value again with the folded tensors, given the exact values of the biases that folding adds, and
returns the measurements at each of the probe's sites."""

ProbedSite = tuple[str, tuple[str, ...], Tensor | None]
"""A site, the adaptations that fold there, and its own columns of a value; None for all columns."""


class Probe(ABC):
    """A value of the base, and the value that replaces it in the adapted graph.

    Args:
        graph: the adapted graph.
        node: the base's node.
        tensors: names of the tensors that determine the value.

    Attributes:
        node: the base's node.
        reads: names of the tensors, among those that determine the value, that the base has.
        inputs: the inputs from which the value is computed, in one or several parts.
        vectors: random vectors by which the value is multiplied before the comparison; None if it is compared directly.
        axis: the axis of the value along which its columns are counted.
    """

    vectors: Tensor | None = None
    axis = -1

    def __init__(self, graph: AdaptedGraph, node: fx.Node, tensors: Sequence[str]) -> None:
        self._graph, self.node, self._tensors = graph, node, tensors
        self.reads: Sequence[str] = tensors
        self.inputs: Sequence[Mapping[fx.Node, Tensor]] = ({},)

    @abstractmethod
    def sites(self, steps: Sequence[FoldStep]) -> list[ProbedSite]:
        """Return the sites whose folds affect the value, given the fold steps of its group."""

    def unfold(self, read: Read, steps: Sequence[FoldStep]) -> Callable[[], Finish]:
        """Compute the value in the adapted graph, before any step if it reads trained copies that a step puts in place.

        Args:
            read: returns a tensor's current values.
            steps: the fold steps that are about to change the tensors.

        Returns:
            A function for the time when trained copies are in place: it measures what the other steps are about to
            change, and returns the function that computes the value again after the fold and compares the two.
        """
        sites = self.sites(steps)
        columns = [own for _, _, own in sites]
        columns += [] if None in columns else [None]
        copied = any(step.copies and not set(self._tensors).isdisjoint(step.tensors) for step in steps)
        # A wrong copy must not be read by both of the values that are compared.
        ahead = copied and self._graph.copies
        computed = [self._seen(self._unfolded(inputs, read), columns) if ahead else None for inputs in self.inputs]

        def start() -> Finish:
            changes, unfolded = [0.0] * len(columns), []
            for inputs, seen in zip(self.inputs, computed, strict=True):
                if seen is None:
                    seen, before = (self._seen(value, columns) for value in self._unfolded_and_base(inputs, read))
                else:
                    before = self._seen(evaluate(self.node, inputs, read), columns)
                changes = _worst(changes, seen, before)
                unfolded.append(seen)
            return self._finish(read, sites, columns, unfolded, changes)

        return start

    def _finish(
        self,
        read: Read,
        sites: Sequence[ProbedSite],
        columns: Sequence[Tensor | None],
        unfolded: Sequence[list[Tensor]],
        changes: Sequence[float],
    ) -> Finish:
        every = columns.index(None)

        def finish(added: Mapping[str, Tensor]) -> list[SiteTally]:
            errors = [0.0] * len(changes)
            for inputs, before in zip(self.inputs, unfolded, strict=True):
                folded = self.folded(evaluate(self.node, inputs, read), added)
                errors = _worst(errors, before, self._seen(folded, columns))
            scales = [largest(1e-30, *map(size, parts)) for parts in zip(*unfolded, strict=True)]
            measured = list(zip(changes, errors, scales, strict=True))
            tallies = [SiteTally(*site[:2], *numbers) for site, numbers in zip(sites, measured, strict=False)]
            whole = SiteTally(self._tensors[0], (), *measured[every])
            # Rows that no site owns must not change; checking the whole value also detects writes to wrong rows.
            if tallies and not whole.algebra <= largest(*(tally.algebra for tally in tallies)):
                tallies[0] = replace(tallies[0], error=whole.error, scale=whole.scale)
            return tallies or [whole]

        return finish

    def folded(self, value: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the folded model's value, given the value that the base's node computes with folded tensors."""
        return value

    def _unfolded_and_base(self, inputs: Mapping[fx.Node, Tensor], read: Read) -> Sequence[Tensor]:
        """Return the value in the adapted graph and in the base graph."""
        graph, values = self._graph, self._staged(inputs)
        kept = graph.kept(self.node, values)
        if kept is not None:
            return evaluate_all((graph.last(self.node), kept), values, read)
        return self._unfolded(inputs, read), evaluate(self.node, inputs, read)

    def _unfolded(self, inputs: Mapping[fx.Node, Tensor], read: Read) -> Tensor:
        """Return the value in the adapted graph."""
        return evaluate(self._graph.last(self.node), self._staged(inputs), read)

    def _staged(self, inputs: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        """Return the probe's inputs as values of the adapted graph."""
        return {stage: value for source, value in inputs.items() for stage in self._graph.stages(source)}

    def _seen(self, value: Tensor, columns: Sequence[Tensor | None]) -> list[Tensor]:
        """Return the parts of a value to compare (some or all of its columns), or random sums over these columns."""
        parts = (value if own is None else value.index_select(self.axis, own) for own in columns)
        return list(parts) if self.vectors is None else [part @ self.vectors[: part.shape[-1]] for part in parts]


class MapProbe(Probe):
    """A probe that runs one map on random inputs.

    Args:
        graph: the adapted graph.
        use: the map in the base.
        device: the device of its tensors.
        seed: the seed for the inputs.
        more: entries to look up in addition to random ones, in a table too large to be looked up in full.
        large: the number of elements above which a table's results are compared through random vectors.
    """

    def __init__(
        self,
        graph: AdaptedGraph,
        use: Use,
        device: torch.device,
        seed: int = 0,
        more: Tensor | None = None,
        large: float = LARGE,
    ) -> None:
        super().__init__(graph, use.node, tensors_of(use))
        self._use, self._device, self.axis = use, device, use.axis
        self.reads = [own.tensor for own in (use.weight, use.bias) if own is not None]
        generator = torch.Generator().manual_seed(seed)
        self.inputs = [{node: value.to(device) for node, value in use.probe(generator).items()}]
        if not isinstance(use, Lookup):
            return
        ((node, entries),) = self.inputs[0].items()
        if more is not None and entries.numel() != use.in_features:
            entries = torch.cat([entries, more[: entries.numel()].expand(*entries.shape[:-1], -1)], -1)
        if entries.shape[-1] * use.out_features > large:
            self.vectors = _vectors(use.out_features, generator, device)
        most = entries.shape[-1] if self.vectors is None else max(1, LARGE // use.out_features)
        self.inputs = [{node: part} for part in torch.split(entries, most, -1)]

    def sites(self, steps: Sequence[FoldStep]) -> list[ProbedSite]:
        """Return the sites whose rows the map reads."""
        use = self._use
        read = [step for step in steps if step.weight.tensor in self.reads]
        # Where other steps apply on top of copies, their sites have the error of both.
        mine = [step for step in read if not step.copies] or read
        # Equal rows of a weight and of its bias count once.
        distinct = {(s.site, s.weight.layout, s.weight.total, s.weight.rows): s.weight for s in mine}
        slices = [(site, own) for (site, *_), own in distinct.items()] or [(use.weight.tensor, use.weight)]
        rows = ((site, self._own_rows(own)) for site, own in slices)
        return [
            (site, _adaptations(s for s in mine if s.site == site), None if own.whole else own.index(self._device))
            for site, own in rows
            if own is not None
        ]

    def _own_rows(self, changed: WeightSlice) -> WeightSlice | None:
        """Return the use's rows that a changed slice affects; None if the use does not read the slice."""
        weight = self._use.weight
        if changed.axis != weight.axis:  # inputs of the map, or experts: any column may change
            return weight.within(weight)
        own = weight.at(changed.rows)
        return own.within(weight) if weight.covers(own) else None

    def folded(self, value: Tensor, added: Mapping[str, Tensor]) -> Tensor:
        """Return the map's result with the bias that folding adds, if any."""
        bias = added.get(added_bias(self.node)) if self._use.bias is None else None
        return value if bias is None else value.movedim(self.axis, -1).add(bias).movedim(-1, self.axis)


class TensorProbe(Probe):
    """A probe for a tensor that belongs to no linear map.

    Args:
        graph: the adapted graph.
        node: the base's node that reads the tensor.
        stored: the tensor; only its shape and device matter.
        seed: the seed for the random vectors by which a large tensor is multiplied.
    """

    def __init__(self, graph: AdaptedGraph, node: fx.Node, stored: Tensor, seed: int = 0) -> None:
        super().__init__(graph, node, [str(node.target)])
        if stored.numel() > LARGE:
            self.vectors = _vectors(stored.shape[-1], torch.Generator().manual_seed(seed), stored.device)

    def sites(self, steps: Sequence[FoldStep]) -> list[ProbedSite]:
        """Return the sites of the steps that change the tensor; its values are compared as a whole."""
        return [(step.site, (step.adaptation,), None) for step in steps if self.reads[0] in step.tensors]


def tensors_of(use: Use) -> tuple[str, str]:
    """Return the names of a map's weight and bias; without a bias, the name of the one that folding would add."""
    return use.weight.tensor, added_bias(use.node) if use.bias is None else use.bias.tensor


def _adaptations(steps: Iterable[FoldStep]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(step.adaptation for step in steps))


def _worst(numbers: Sequence[float], a: Sequence[Tensor], b: Sequence[Tensor]) -> list[float]:
    """Return the larger of each number and the largest difference between the corresponding tensors."""
    return [largest(number, furthest(*pair)) for number, *pair in zip(numbers, a, b, strict=True)]


def _vectors(width: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Return `PROBES` random vectors, as columns."""
    return torch.randn(width, PROBES, generator=generator, dtype=torch.float64).to(device)
