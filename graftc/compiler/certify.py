"""Certificates: evidence that a fold computes the same function, from something other than the fold's own formula.

Numeric: the *unfolded subgraph* between a linear map's input and its output, run in float64 on random probes, against
the folded tensors, per site; then the outputs of the whole model in its own dtype. Structural: the folded graph's
hash equals the base's, up to declared additions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.pipeline import Compilation, Family
from graftc.passes.core.folds import LazyTensors
from graftc.passes.core.program import Program, map_nodes
from graftc.passes.core.rows import Rows
from graftc.passes.core.sites import linear_use
from graftc.passes.core.store import Store

aten = torch.ops.aten
PROBES = 16
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

    @property
    def largest_difference(self) -> float:
        """The largest difference of any output."""
        return max(self.outputs.values(), default=0.0)

    @property
    def passed(self) -> bool:
        """Every site's evidence holds, outputs keep to the budget, and the structure is the base's."""
        within = all(value <= self.budget for value in self.outputs.values())
        same = self.structure == self.base_structure
        return bool(self.sites) and within and same and all(site.passed for site in self.sites)

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
        return found or ([] if self.sites else ["nothing was folded"])

    def to_json(self) -> dict[str, Any]:
        """Everything, as JSON data."""
        return {
            "passed": self.passed,
            **asdict(self),
            "sites": [{**asdict(site), "adaptations": list(site.adaptations)} for site in self.sites],
            "outputs": dict(self.outputs),
            "additions": list(self.additions),
            "notes": list(self.notes),
            "largest_difference": self.largest_difference,
        }


def probe_sites(compilation: Compilation, lazy: LazyTensors, seed: int = 0) -> tuple[SiteEvidence, ...]:
    """Probe every linear map that folding changes, and compare every other folded tensor to what was trained."""
    family, store = compilation.main, compilation.store
    touched = set(lazy.names) | {s.bias for s in lazy.steps if s.bias is not None}
    evidence: list[SiteEvidence] = []
    probed: set[str] = set()
    nodes = {node.name: node for node in family.eval.graph.nodes}
    for base_node in family.base_eval.graph.nodes:
        use = linear_use(base_node)
        if use is None or touched.isdisjoint({use.weight, use.bias or f"{base_node.meta['module']}.bias"}):
            continue
        steps = [s for s in lazy.steps if s.weight in (use.weight, use.bias)]
        spans = {(s.site, s.rows): None for s in steps}
        runner = _Isolated(family, nodes[base_node.name], use.input_index, store)
        evidence += _probe(runner, lazy, use, spans, seed)
        probed |= {use.weight, use.bias or ""}
    for name in lazy.names:
        if name not in probed:
            evidence.append(_compare_tensor(lazy, name, store))
    return tuple(evidence)


class _Isolated:
    """The unfolded computation of one linear map, from its first input to its last result, in float64."""

    def __init__(self, family: Family, node: fx.Node, input_index: int, store: Store) -> None:
        program = family.eval
        self.store = store
        forward = {edit.before: edit.after for edit in program.edits}
        backward = {edit.after: edit.before for edit in program.edits}
        self.output = node
        while self.output in forward:
            self.output = forward[self.output]
        source = node.args[input_index]
        assert isinstance(source, fx.Node)
        while source in backward:
            source = backward[source]
        self.input = source

    def run(self, probe: Tensor) -> Tensor:
        """The map's result for ``probe``."""
        values: dict[fx.Node, Any] = {self.input: probe}
        for node in self._needed():
            if node.op == "get_attr":
                held = self.store.get(str(node.target)).detach()
                values[node] = held.double() if held.is_floating_point() else held
                continue
            args, kwargs = map_nodes((node.args, dict(node.kwargs)), values.__getitem__)
            widened = tuple(torch.float64 if isinstance(a, torch.dtype) and a.is_floating_point else a for a in args)
            values[node] = node.target(*widened, **kwargs)  # type: ignore[operator]
        result: Tensor = values[self.output]
        return result

    def _needed(self) -> list[fx.Node]:
        found: set[fx.Node] = set()
        pending = [self.output]
        while pending:
            node = pending.pop()
            if node in found or node is self.input:
                continue
            if node.op == "placeholder":
                raise ValueError(f"the adaptation at {self.output} reads {node} besides the site's input")
            found.add(node)
            pending += node.all_input_nodes
        return sorted(found)


def _probe(
    runner: _Isolated, lazy: LazyTensors, use: Any, spans: Mapping[tuple[str, Rows], None], seed: int
) -> list[SiteEvidence]:
    store = lazy.store
    generator = torch.Generator().manual_seed(seed)
    leading = (1,) * (runner.input.meta["val"].dim() - 2)
    probe = torch.randn(*leading, PROBES, use.in_features, generator=generator, dtype=torch.float64)
    probe = probe.to(store.get(use.weight).device)
    unfolded = runner.run(probe)
    weight, bias = _exact(lazy, use.weight), _exact(lazy, use.bias)
    if bias is None and f"{use.node.meta['module']}.bias" in lazy.additions():
        bias = lazy.exact(f"{use.node.meta['module']}.bias")
    folded = _linear(probe, weight, bias, use.transposed)
    base_bias = None if use.bias is None else store.get(use.bias).detach().double()
    base = _linear(probe, store.get(use.weight).detach().double(), base_bias, use.transposed)
    scale = max(float(unfolded.abs().max()), 1e-30)
    rounding = max(_ulps(lazy, name) for name in (use.weight, use.bias) if name is not None)
    found: list[SiteEvidence] = []
    for site, rows in spans or {(use.weight, Rows(use.out_features)): None}:
        columns = rows.index(unfolded.device)
        difference = (unfolded - folded).index_select(-1, columns).abs().max()
        change = (unfolded - base).index_select(-1, columns).abs().max()
        names = tuple(dict.fromkeys(s.adaptation for s in lazy.steps if s.site == site))
        found.append(SiteEvidence(site, names, float(change), float(difference) / scale, rounding))
    # Rows that no site owns must not have moved: a fold that writes to the wrong rows shows here as well.
    worst = float((unfolded - folded).abs().max()) / scale
    if worst > max(item.algebra for item in found):
        found[0] = replace(found[0], algebra=worst)
    return found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, transposed: bool) -> Tensor:
    result = x @ (weight if transposed else weight.t())
    return result if bias is None else result + bias


def _exact(lazy: LazyTensors, name: str | None) -> Any:
    if name is None:
        return None
    return lazy.exact(name) if lazy.chain(name) else lazy.store.get(name).detach().double()


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


def _compare_tensor(lazy: LazyTensors, name: str, store: Store) -> SiteEvidence:
    """A tensor that is no linear map's: it folds by standing in, so it must equal what was trained to the bit."""
    steps = lazy.chain(name)
    trained = store.overlay(name)
    folded = lazy.folded(name)
    base = store.get(name).detach()
    expected = store.get(trained).detach() if trained is not None else folded
    algebra = float((folded.double() - expected.double()).abs().max())
    change = float((folded.double() - base.double()).abs().max())
    return SiteEvidence(name, tuple(dict.fromkeys(s.adaptation for s in steps)), change, algebra, 0.0)


def sample_inputs(program: Program, store: Store, seed: int = 0, sizes: Sequence[int] = (2, 9)) -> dict[str, Tensor]:
    """Random inputs for a Program: indices within their table, masks with padding at the end, normal floats."""
    generator = torch.Generator().manual_seed(seed)
    device = next((t.device for _, t in store.base()), torch.device("cpu"))
    axes: dict[str, int] = {}
    inputs: dict[str, Tensor] = {}
    for spec, node in zip(program.inputs, program.placeholders(), strict=True):
        shape = []
        for size in spec.shape:
            if isinstance(size, str):
                axes.setdefault(size, sizes[min(len(axes), len(sizes) - 1)])
            shape.append(axes[size] if isinstance(size, str) else size)
        if spec.dtype.is_floating_point:
            value = torch.randn(shape, generator=generator).to(spec.dtype)
        elif (rows := _table_rows(node)) is not None:
            value = torch.randint(0, rows, shape, generator=generator, dtype=spec.dtype)
        else:
            value = torch.ones(shape, dtype=spec.dtype)
            if len(shape) == 2 and shape[1] > 2:
                value[-1, -2:] = 0
        inputs[spec.name] = value.to(device)
    return inputs


def _table_rows(node: fx.Node) -> int | None:
    """Rows of the table that an input indexes."""
    for user in node.users:
        if user.target is aten.embedding.default and isinstance(user.args[0], fx.Node):
            return int(user.args[0].meta["val"].shape[0])
        if user.target in (aten.view.default, aten.reshape.default) and (found := _table_rows(user)) is not None:
            return found
    return None
