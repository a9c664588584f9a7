"""Certificates: evidence that a fold computes the same function, from something other than the fold's own formula.

Numeric: the *unfolded subgraph* between a linear map's input and its output, run in float64 on random probes, against
the folded tensors, per site; then the outputs of the whole model in its own dtype. Structural: the folded graph's
hash equals the base's, up to declared additions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.pipeline import Compilation
from graftc.passes.core.folds import LazyTensors
from graftc.passes.core.layout import Layout
from graftc.passes.core.program import Program, follow, map_nodes
from graftc.passes.core.rows import Rows
from graftc.passes.core.sites import Use, linear_use
from graftc.passes.core.uses import Lookup

aten = torch.ops.aten
ALGEBRA_BOUND = 1e-9
"""Largest relative difference of float64 results; sums of some thousand float64 products stay far below."""

DEFAULT_BUDGET: Mapping[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-4,
    torch.float16: 2e-2,
    torch.bfloat16: 1e-1,
}
"""Largest difference of outputs by dtype, relative to the largest output or 1."""


@dataclass(frozen=True)
class SiteEvidence:
    """What probing showed at one site.

    Attributes:
        site: the SiteKey, or the tensor's name.
        adaptations: what folds there.
        change: largest change of the output by the adaptation, so that a vacuous check shows.
        algebra: difference of unfolded and folded output in float64, before rounding, over the largest output.
        rounding: largest distance of a folded element from its float64 value, in units in the last place.
    """

    site: str
    adaptations: tuple[str, ...]
    change: float
    algebra: float
    rounding: float

    @property
    def passed(self) -> bool:
        """The algebra holds and rounding was to nearest."""
        return self.algebra <= ALGEBRA_BOUND and self.rounding <= 0.5000001


@dataclass(frozen=True)
class CollapseEvidence:
    """How far an adaptation's deployed form is from what it was in training, at one site.

    Attributes:
        adaptation, site: whose, and where.
        routings: how many ways there are to draw its routes; all were run.
        error: largest difference, on random probes in float64, between the mean of all of them and the deployed form,
            over the largest change that this makes. Within rounding where the two are the same function.
    """

    adaptation: str
    site: str
    routings: int
    error: float


@dataclass(frozen=True)
class Certificate:
    """The evidence for one fold.

    Attributes:
        sites: evidence per site.
        outputs: largest absolute difference of each output, folded against unfolded, in the model's dtype.
        budget: what `outputs` may differ by.
        structure: hash of the folded graph.
        base_structure: hash of the base's graph.
        additions: biases that folding had to add.
        fingerprint: of the base.
        collapses: what was drawn while training and is deployed as its mean, folded or not. Nothing is held against it.
    """

    sites: tuple[SiteEvidence, ...]
    outputs: Mapping[str, float]
    budget: float
    structure: str
    base_structure: str
    additions: tuple[str, ...] = ()
    fingerprint: str = ""
    dtype: str = ""
    notes: tuple[str, ...] = field(default_factory=tuple)
    collapses: tuple[CollapseEvidence, ...] = ()

    @property
    def largest_difference(self) -> float:
        """The largest difference of any output."""
        return max(self.outputs.values(), default=0.0)

    @property
    def passed(self) -> bool:
        """Every site's evidence holds, outputs keep to the budget, and the structure is the base's."""
        within = all(value <= self.budget for value in self.outputs.values())
        same = self.structure == self.base_structure
        return bool(self.sites or self.collapses) and within and same and all(site.passed for site in self.sites)

    def failures(self) -> list[str]:
        """Why it did not pass, for people."""
        found = [
            f"{s.site}: algebra {s.algebra:.2e} (at most {ALGEBRA_BOUND:.0e}), "
            f"rounding {s.rounding:.3f} ulp (at most 0.5)"
            for s in self.sites
            if not s.passed
        ]
        found += [
            f"output {name} differs by {value:.3e}, the budget is {self.budget:.3e}"
            for name, value in self.outputs.items()
            if not value <= self.budget
        ]
        if self.structure != self.base_structure:
            found.append("the folded graph is not the base's graph")
        return found or ([] if self.sites or self.collapses else ["nothing was folded"])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {
            "passed": self.passed,
            **asdict(self),
            "sites": [{**asdict(site), "adaptations": list(site.adaptations)} for site in self.sites],
            "outputs": dict(self.outputs),
            "additions": list(self.additions),
            "notes": list(self.notes),
            "collapses": [asdict(item) for item in self.collapses],
            "largest_difference": self.largest_difference,
        }


def probe_sites(
    compilation: Compilation, lazy: LazyTensors, unfolded: Program | None = None, seed: int = 0
) -> tuple[SiteEvidence, ...]:
    """Probe every map that folding changes, and compare every other folded tensor to what stands in for it.

    Args:
        compilation: what was folded.
        lazy: the folded tensors.
        unfolded: the graph with just the adaptations that fold; that of the Compilation by default.
        seed: of the probes.
    """
    family = compilation.main
    touched = set(lazy.names) | {s.bias for s in lazy.steps if s.bias is not None}
    evidence: list[SiteEvidence] = []
    probed: set[str] = set()
    adapted = Adapted(unfolded or family.eval)
    for node in family.base_eval.graph.nodes:
        use = linear_use(node)
        if use is None or touched.isdisjoint({use.weight, use.bias or added_bias(node)}):
            continue
        evidence += _Probe(adapted, use, lazy, seed).evidence()
        probed |= {use.weight, use.bias or ""}
    for node in family.base_eval.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name in lazy.names and name not in probed:
            evidence.append(_compare_tensor(adapted.last(node), name, lazy))
    return tuple(evidence)


def added_bias(node: fx.Node) -> str:
    """Name of the bias that folding adds to a map that has none."""
    return f"{node.meta['module']}.bias".lstrip(".")


class Adapted:
    """Where nodes of the base are in the adapted graph.

    Args:
        program: the adapted graph.
    """

    def __init__(self, program: Program) -> None:
        self._nodes = {node.name: node for node in program.graph.nodes}
        self._forward = {edit.before: edit.after for edit in program.edits if not edit.narrow}
        self._backward = {edit.after: edit.before for edit in program.edits}

    def stages(self, node: fx.Node) -> list[fx.Node]:
        """What stands for a base node's value, from before any edit to after the last."""
        found = [follow(self._nodes[node.name], self._backward)]
        while found[-1] in self._forward:
            found.append(self._forward[found[-1]])
        return found

    def last(self, node: fx.Node) -> fx.Node:
        """What stands for a base node after every edit."""
        return follow(self._nodes[node.name], self._forward)


class _Probe:
    """One map, unfolded and folded, on the same random inputs in float64.

    Unfolded, the adapted graph between the map's input and its last result runs over the base's tensors and the
    adapters. Folded, the base's own call runs over the folded ones.
    """

    def __init__(self, adapted: Adapted, use: Use, lazy: LazyTensors, seed: int) -> None:
        self.adapted, self.use, self.lazy, self.store = adapted, use, lazy, lazy.store
        generator = torch.Generator().manual_seed(seed)
        device = self.store.get(use.weight).device
        probes = {node: value.to(device) for node, value in use.probe(generator).items()}
        self.inputs = {node: self._with_replaced(value) for node, value in probes.items()}

    def _with_replaced(self, probe: Tensor) -> Tensor:
        """Of a table that is too large to look all of it up, what stands in for some entries is looked up as well."""
        steps = [s for s in self.lazy.chain(self.use.weight) if s.layout is Layout.PLAIN and not s.rows.whole]
        if not isinstance(self.use, Lookup) or probe.numel() == self.use.in_features or not steps:
            return probe
        replaced = torch.cat([s.rows.index(probe.device) for s in steps])[: probe.numel()]
        return torch.cat([probe, replaced.expand(*probe.shape[:-1], -1)], -1)

    def evidence(self) -> list[SiteEvidence]:
        """What the probes show for each site of the map."""
        use, lazy = self.use, self.lazy
        unfolded, base = self._unfolded(), evaluate(use.node, self.inputs, self._base)
        folded = self._with_added_bias(evaluate(use.node, self.inputs, self._folded))
        scale = max(float(unfolded.abs().max()), 1e-30)
        rounding = max(_ulps(lazy, name) for name in (use.weight, use.bias) if name is not None)
        steps = [s for s in lazy.steps if s.weight in (use.weight, use.bias)]
        spans = {(s.site, s.rows, s.layout): None for s in steps} or {(use.weight, use.stored, use.layout): None}
        found: list[SiteEvidence] = []
        for site, rows, layout in spans:
            columns = self._columns(rows, layout)
            if columns is None:
                continue
            difference = (unfolded - folded).index_select(use.axis, columns).abs().max()
            change = (unfolded - base).index_select(use.axis, columns).abs().max()
            names = tuple(dict.fromkeys(s.adaptation for s in lazy.steps if s.site == site))
            found.append(SiteEvidence(site, names, float(change), float(difference) / scale, rounding))
        # Rows that no site owns must not have moved: a fold that writes to the wrong rows shows here as well.
        worst = float((unfolded - folded).abs().max()) / scale
        if not found:
            found.append(SiteEvidence(use.weight, (), float((unfolded - base).abs().max()), worst, rounding))
        elif worst > max(item.algebra for item in found):
            found[0] = replace(found[0], algebra=worst)
        return found

    def _columns(self, rows: Rows, layout: Layout) -> Tensor | None:
        """Columns of the result that these stored rows are; None where this use does not read them."""
        device = next(iter(self.inputs.values())).device
        dims = self.store.get(self.use.weight).dim()
        if (layout.axis - self.use.layout.axis) % dims:  # inputs of the map, or experts: any column may change
            return Rows(self.use.out_features).index(device)
        return rows.within(self.use.stored).index(device) if self.use.stored.covers(rows) else None

    def _unfolded(self) -> Tensor:
        values = {stage: value for node, value in self.inputs.items() for stage in self.adapted.stages(node)}
        return evaluate(self.adapted.last(self.use.node), values, self._base)

    def _base(self, name: str) -> Tensor:
        return self.store.get(name).detach()

    def _folded(self, name: str) -> Tensor:
        return self.lazy.exact(name) if self.lazy.chain(name) else self._base(name)

    def _with_added_bias(self, folded: Tensor) -> Tensor:
        name = added_bias(self.use.node)
        if self.use.bias is not None or name not in self.lazy.additions():
            return folded
        return folded.movedim(self.use.axis, -1).add(self.lazy.exact(name)).movedim(-1, self.use.axis)


def evaluate(output: fx.Node, inputs: Mapping[fx.Node, Tensor], tensor: Callable[[str], Tensor]) -> Tensor:
    """The value of ``output`` in float64, from the values of other nodes and the tensors that are read.

    Args:
        output: a node.
        inputs: values of nodes that are not to be computed.
        tensor: gives a tensor of the Store by name.

    Raises:
        ValueError: it depends on an input of the graph that has no value.
    """
    values: dict[fx.Node, Any] = dict(inputs)
    for node in _needed(output, inputs):
        if node.op == "get_attr":
            held = tensor(str(node.target))
            values[node] = held.double() if held.is_floating_point() else held
            continue
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), values.__getitem__)
        widened = tuple(torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args)
        values[node] = node.target(*widened, **kwargs)  # type: ignore[operator]
    result: Tensor = values[output]
    return result


def _needed(output: fx.Node, inputs: Mapping[fx.Node, Tensor]) -> list[fx.Node]:
    found: set[fx.Node] = set()
    pending = [output]
    while pending:
        node = pending.pop()
        if node in found or node in inputs:
            continue
        if node.op == "placeholder":
            raise ValueError(f"the adaptation at {output} reads {node} besides the site's input")
        found.add(node)
        pending += node.all_input_nodes
    return sorted(found)


def _ulps(lazy: LazyTensors, name: str) -> float:
    """Largest distance of the rounded tensor from the exact one, in units in the last place."""
    if not lazy.chain(name):
        return 0.0
    exact, rounded = lazy.exact(name), lazy.folded(name)
    return units_in_last_place(rounded, exact)


def units_in_last_place(rounded: Tensor, exact: Tensor) -> float:
    """Largest ``|rounded - exact|`` in units in the last place of ``rounded``'s dtype."""
    info = torch.finfo(rounded.dtype)
    exponent = torch.frexp(exact.abs().clamp_min(info.tiny)).exponent - 1
    unit = torch.ldexp(torch.ones_like(exact), exponent) * info.eps
    return float(((rounded.double() - exact).abs() / unit).max())


def _compare_tensor(stand_in: fx.Node, name: str, lazy: LazyTensors) -> SiteEvidence:
    """A tensor that is no linear map's: what stands in for it in the adapted graph, in float64, against the folded."""
    unfolded = evaluate(stand_in, {}, lambda held: lazy.store.get(held).detach())
    base, exact = lazy.store.get(name).detach().double(), lazy.exact(name)
    scale = max(float(unfolded.abs().max()), 1e-30)
    adaptations = tuple(dict.fromkeys(s.adaptation for s in lazy.chain(name)))
    change, difference = (float((unfolded - other).abs().max()) for other in (base, exact))
    return SiteEvidence(name, adaptations, change, difference / scale, _ulps(lazy, name))
