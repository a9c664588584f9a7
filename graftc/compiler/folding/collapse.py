"""Collapse adaptations that do not fold into a simpler deployed form, and measure its distance from the trained form.

To collect the evidence, the train Program's own nodes at a site run once for every possible draw of the site's routes;
the mean of the results is compared with the result of the same nodes in eval mode.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.evaluating import evaluate
from graftc.compiler.folding.samples import samples
from graftc.compiler.folding.virtual_keys import are_constant, slot_parameters, slot_values
from graftc.compiler.resolve.resolver import Resolved
from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import Program, above, provenance
from graftc.passes.core.ir.routes import is_pick, is_route
from graftc.passes.core.method.capabilities import Collapsing
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import SiteKey
from graftc.passes.core.weights.folds import round_once
from graftc.passes.graph.compose import GATE
from graftc.records.certificate import CollapseEvidence
from graftc.specs.base import MethodSpec
from graftc.specs.document import Spec

aten = torch.ops.aten


def collapsing(compilation: Compilation) -> list[Resolved]:
    """Return the adaptations that are deployed in simpler form."""
    return [resolved for resolved in compilation.main.resolved if _simpler(compilation, resolved) is not None]


def collapsed_spec(compilation: Compilation, names: Collection[str] | None = None) -> Spec:
    """Return the spec with each adaptation that collapses replaced by its simpler form.

    Args:
        compilation: the trained compilation.
        names: names of the adaptations to keep, collapsed or not; by default all.
    """
    simpler = {resolved.name: _simpler(compilation, resolved) for resolved in compilation.main.resolved}
    spec = compilation.spec
    kept = (a for a in spec.adapt if names is None or a.name in names)
    return spec.model_copy(update={"adapt": tuple(simpler.get(str(a.name)) or a for a in kept)})


def _simpler(compilation: Compilation, resolved: Resolved) -> MethodSpec | None:
    """Return the simpler spec with which an adaptation is deployed; None if it is deployed unchanged."""
    if resolved.spec.virtual_tokens() and not are_constant(compilation, resolved):
        return None
    method = method_for(resolved.spec.method)
    simpler = method.collapse(resolved.spec) if isinstance(method, Collapsing) else None
    return None if simpler is None else simpler.model_copy(update={"dtype": resolved.spec.dtype})


def collapsed_values(compilation: Compilation) -> dict[str, Tensor]:
    """Return the simpler adaptations' tensors by full name, rounded once."""
    store = compilation.store
    tensors: dict[str, Tensor] = {}
    for resolved in collapsing(compilation):
        if resolved.spec.virtual_tokens():
            tensors |= slot_values(compilation, resolved)
            continue
        for prefix, own in places(compilation, resolved, lambda name: store.full(name).double()):
            dtype = store.get(prefix + next(iter(own.tensors))).dtype
            tensors |= {prefix + part: round_once(value, dtype).contiguous() for part, value in own.collapsed().items()}
    return tensors


def collapsed_parameters(compilation: Compilation) -> dict[str, int]:
    """Return each simpler adaptation's number of elements, by name, counted from shapes."""
    return {resolved.name: _parameters(compilation, resolved) for resolved in collapsing(compilation)}


def _parameters(compilation: Compilation, resolved: Resolved) -> int:
    if resolved.spec.virtual_tokens():
        return slot_parameters(compilation, resolved)
    store = compilation.store

    def shaped(name: str) -> Tensor:
        return torch.empty(store.get(name).shape, dtype=torch.float64, device="meta")

    return sum(v.numel() for _, own in places(compilation, resolved, shaped) for v in own.collapsed().values())


class PlaceTensors:
    """The tensors of one place.

    Attributes:
        spec: the adaptation with the place's overrides applied.
        tensors: its own tensors, by part.
        shared: the tensors that all places share, by part.
    """

    def __init__(self, spec: MethodSpec, tensors: Mapping[str, Tensor], shared: Mapping[str, Tensor]) -> None:
        self.spec, self.tensors, self.shared = spec, tensors, shared

    def collapsed(self) -> Mapping[str, Tensor]:
        """Return the deployed tensors by part."""
        gates = {part: value for part, value in self.tensors.items() if part in GATE}
        method = method_for(self.spec.method)
        assert isinstance(method, Collapsing)
        return {**gates, **method.collapsed(self.spec, {**self.shared, **self.tensors})}


def places(compilation: Compilation, resolved: Resolved, read: Any) -> Iterator[tuple[str, PlaceTensors]]:
    """Yield the tensors of every place, together with the prefix of their names."""
    parts = compilation.parts[resolved.name]
    shared = {part: read(name) for part, name in parts.get(None, {}).items()}
    for site, spec in resolved.places:
        names = parts[site.key]
        prefix = next(name.removesuffix(part) for part, name in names.items())
        yield prefix, PlaceTensors(spec, {part: read(name) for part, name in names.items()}, shared)


def place_values(compilation: Compilation, resolved: Resolved) -> Iterator[tuple[SiteKey, Mapping[str, Tensor]]]:
    """Yield the deployed tensors of each of an adaptation's places, by part.

    These are the place's own tensors, or the result of collapsing them.
    """
    simpler = _simpler(compilation, resolved)
    for site, (_, own) in zip(resolved.places, places(compilation, resolved, compilation.store.full), strict=True):
        yield site[0].key, own.tensors if simpler is None else own.collapsed()


def collapse_evidence(compilation: Compilation, seed: int = 0) -> tuple[CollapseEvidence, ...]:
    """Measure how far each place's deployed function is from the mean over all routes that training can draw."""
    drawn = [resolved for resolved in collapsing(compilation) if not resolved.spec.virtual_tokens()]
    if not drawn:
        return ()
    train = compilation.program("train")
    routed, averaged = to_eval(train, keep={aten.index_select.default}), to_eval(train)
    places = [(r.name, str(site.key)) for r in drawn for site, _ in r.places]
    probe = _Routes(compilation, routed, averaged, places, seed)
    return tuple(probe.evidence(*place) for place in places)


class _Routes:
    """A Program whose routes are drawn, and the same Program with the mean of its routes, compared site by site."""

    def __init__(
        self,
        compilation: Compilation,
        routed: Program,
        averaged: Program,
        places: Sequence[tuple[str, str]],
        seed: int,
    ) -> None:
        self.compilation, self.seed = compilation, seed
        self.averaged = {node.name: node for node in averaged.graph.nodes}
        self.device = next(t.device for _, t in compilation.store.adapters())
        self.spans = self._spans(routed, places)
        self.read = {end: self._boundary(place, start, end) for place, (start, end) in self.spans.items()}
        self.samples = self._sampled(dict.fromkeys(node for nodes in self.read.values() for node in nodes))

    def evidence(self, adaptation: str, site: str) -> CollapseEvidence:
        """Return the evidence for one site."""
        start, end = self.spans[adaptation, site]
        inputs = self._inputs(end)
        draws = sorted(self._draws(end, inputs))
        deployed = evaluate(
            self.averaged[end.name],
            {self.averaged[n.name]: value for n, value in inputs.items() if n.name in self.averaged},
            self._tensor,
        )
        total = torch.zeros_like(deployed)
        routings = list(itertools.product(*(range(int(draw.args[2])) for draw in draws)))  # type: ignore[arg-type]
        for numbers in routings:
            chosen = {d: torch.tensor([i], device=total.device) for d, i in zip(draws, numbers, strict=True)}
            total += evaluate(end, {**inputs, **chosen}, self._tensor)
        error = float((total / len(routings) - deployed).abs().max())
        change = float((deployed if start is None else deployed - inputs[start]).abs().max())
        return CollapseEvidence(adaptation, site, len(routings), error / change if change else error)

    def _tensor(self, name: str) -> Tensor:
        return self.compilation.store.full(name)

    @staticmethod
    def _spans(
        routed: Program, places: Sequence[tuple[str, str]]
    ) -> dict[tuple[str, str], tuple[fx.Node | None, fx.Node]]:
        """Return, for each adaptation and site, the node that was replaced and the node that replaces it.

        An adaptation within a composition replaces nothing by itself; its own result is then paired with None.
        """
        edits = {(e.adaptation, e.site): (e.before, e.after) for e in routed.edits if not e.narrow}
        results: dict[tuple[str, str], fx.Node] = {}
        for node in routed.graph.nodes:
            mine = _owner(node)
            if any(_owner(user) != mine for user in node.users):
                results[mine] = node
        return {place: edits.get(place) or (None, results[place]) for place in places}

    def _inputs(self, end: fx.Node) -> dict[fx.Node, Any]:
        """Return values for the nodes that the adaptation reads at a site, in float64.

        Floating-point values are random, with the shapes that they have for the sample inputs; masks, integers and
        sizes have the same values as for the sample inputs.
        """
        generator = torch.Generator().manual_seed(self.seed)

        def random(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            return torch.randn(value.shape, generator=generator, dtype=torch.float64).to(value.device)

        return {node: random(self.samples[node]) for node in self.read[end]}

    def _sampled(self, nodes: Collection[fx.Node]) -> dict[fx.Node, Any]:
        """Return the values that nodes of the routed Program have for the sample inputs."""
        compilation = self.compilation
        inputs = samples(compilation)
        values = computed(list(nodes), lambda node: inputs[str(node.target)], compilation.store.get, self.device)
        return dict(zip(nodes, values, strict=True))

    @staticmethod
    def _boundary(mine: tuple[str, str], start: fx.Node | None, end: fx.Node) -> list[fx.Node]:
        """Return the nodes outside an adaptation that the adaptation reads at a site, except tensors and routes."""
        outside: dict[fx.Node, None] = {} if start is None else {start: None}
        pending, seen = [end], set(outside)
        while pending:
            node = pending.pop()
            if node in seen or node.op == "get_attr" or is_route(node):
                continue
            seen.add(node)
            if _owner(node) == mine:
                pending += node.all_input_nodes
            else:
                outside[node] = None
        return list(outside)

    @staticmethod
    def _draws(end: fx.Node, inputs: Mapping[fx.Node, Any]) -> set[fx.Node]:
        """Return the routes that determine the result at a site."""
        routes = (node for node in above([end], stop=inputs) if node not in inputs and is_route(node))
        return {node for node in routes if any(is_pick(user) for user in node.users)}


def _owner(node: fx.Node) -> tuple[str, str]:
    """Return the adaptation and the site for which a node was inserted."""
    origin = provenance(node) or {}
    return origin.get("adaptation", ""), origin.get("site", "")
