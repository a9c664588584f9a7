"""Describe every tensor that trains: its adaptation, its function in the adaptation, and its depth in the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal, TypeAlias

from torch import Tensor, fx

from graftc.compat.modules import children_of
from graftc.compiler.compilation import Compilation
from graftc.compiler.roles.findings import place
from graftc.passes.core.ir.layers import repeated_layers
from graftc.passes.core.ir.program import Program
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import EmbeddingSite, LinearSite, Site, SiteKey
from graftc.passes.graph.compose import GATE
from graftc.specs.claims import Claims

Kind: TypeAlias = Literal["weight", "up", "table", "vector"]
"""`up`: the factor next to the output in a low-rank product. `table`: a factor at an embedding table. `vector`:
biases, norms, scales and gates. `weight`: everything else."""


@dataclass(frozen=True)
class TrainedTensor:
    """A tensor that trains.

    Attributes:
        name, tensor: its name in the Store, and the tensor.
        adaptation: the adaptation that it belongs to; ``trained`` for the spec's ``train`` list, ``tokens`` for new
            tokens.
        part: its name within the adaptation.
        kind: its function.
        inert: whether the method claims that it may have no gradient at first.
        site: the site that it belongs to; None for a tensor that belongs to the adaptation as a whole.
        below: its layer's position counted from the end of the stack, 1 for the last layer; the number of layers plus
            one for tensors that are read before the layers, and 0 for all others outside the layers.
    """

    name: str
    tensor: Tensor
    adaptation: str
    part: str
    kind: Kind
    inert: bool
    site: SiteKey | None
    below: int


def trained_tensors(compilation: Compilation) -> Iterator[TrainedTensor]:
    """Return an iterator over the tensors that currently train, each once, in Store order."""
    known: dict[str, TrainedTensor] = {}
    depths = _Depths(compilation)
    store = compilation.store
    claims = {r.name: r.spec.claims for r in compilation.main.resolved}
    for adaptation, at in compilation.parts.items():
        sites = _sites(compilation, adaptation)
        stored = _stored(compilation, adaptation, sites)
        for key, parts in at.items():
            site = sites.get(key) if key is not None else None
            for part, name in parts.items():
                tensor = store.get(name)
                if not tensor.requires_grad or name in known:
                    continue
                axes = _axes(part, tensor, site, stored.get(key, {}))
                kind = _kind(part, axes, site, claims.get(adaptation), copied=key in stored)
                inert = any(fnmatchcase(part, p) for p in claims[adaptation].inert) if adaptation in claims else False
                known[name] = TrainedTensor(name, tensor, adaptation, part, kind, inert, key, depths.of(name, key))
    return (known[name] for name, tensor in store.adapters() if name in known)


def _sites(compilation: Compilation, adaptation: str) -> dict[SiteKey, Site]:
    """Return the sites of an adaptation, or of a composition's members, by key."""
    main = compilation.main
    unit = compilation.unit_of.get(adaptation)
    members = unit.members if unit is not None else [r for r in main.resolved if r.name == adaptation]
    return {**{site.key: site for site in main.trained}, **{s.key: s for r in members for s, _ in r.sites}}


def _stored(
    compilation: Compilation, adaptation: str, sites: Mapping[SiteKey, Site]
) -> Mapping[SiteKey | None, dict[str, int]]:
    """Return the number of axes in each base tensor that an adaptation replaces, by site and part."""
    resolved = next((r for r in compilation.main.resolved if r.name == adaptation), None)
    if resolved is None or not method_for(resolved.spec.method).stands_in:
        return {}
    base = compilation.store
    return {key: {region.part: len(region.shape) for region in slices_of(s, base)} for key, s in sites.items()}


def _axes(part: str, tensor: Tensor, site: Site | None, stored: Mapping[str, int]) -> int:
    """Return a tensor's number of axes, not counting expert axes.

    For entries of a base tensor, this is at least the base tensor's number of axes.
    """
    for name, axes in stored.items():
        if part == name or part.startswith(f"{name}_"):
            return max(axes, tensor.dim())
    return tensor.dim() - (len(site.leading) if isinstance(site, LinearSite) else 0)


def _kind(part: str, axes: int, site: Site | None, claims: Claims | None, *, copied: bool) -> Kind:
    gates = claims.undecayed if claims is not None else ()
    if axes <= 1 or part in GATE or any(fnmatchcase(part, pattern) for pattern in gates):
        return "vector"
    if isinstance(site, EmbeddingSite) and not copied:
        return "table"
    return "up" if claims is not None and part in claims.up else "weight"


class _Depths:
    """The depths of tensors, based on their layers or, outside the layers, on where the graph first reads them."""

    def __init__(self, compilation: Compilation) -> None:
        program = compilation.program("train")
        self._layers = _layers(compilation, program)
        self._first: dict[str, int] = {}
        self._start: int | None = None
        for number, node in enumerate(program.graph.nodes):
            if node.op == "get_attr":
                continue
            for source in node.all_input_nodes:
                if source.op == "get_attr":
                    self._first.setdefault(str(source.target), number)
            if self._start is None and self._stack_of(node) in self._layers:
                self._start = number

    def of(self, name: str, key: SiteKey | None) -> int:
        """Return `TrainedTensor.below` for a tensor."""
        if key is None:
            return 0
        layer, stack = place(key.module)
        if stack in self._layers and layer is not None:
            return self._layers[stack] - layer
        early = self._start is not None and self._first.get(name, self._start) < self._start
        return max(self._layers.values(), default=0) + 1 if early else 0

    @staticmethod
    def _stack_of(node: fx.Node) -> str:
        return place(node.meta.get("module", ""))[1]


def _layers(compilation: Compilation, program: Program) -> dict[str, int]:
    """Return the number of layers in each stack.

    The stacks are those with residual branches or, if there are none, all module lists that the graph runs.
    """
    branches = {s.stack for s in compilation.main.structure.sublayers if s.stack}
    stacks = branches or {path.rpartition(".")[0] for path in repeated_layers(program)}
    containers = {stack: compilation.store.container(stack) for stack in stacks}
    return {stack: sum(name.isdigit() for name in children_of(c)) for stack, c in containers.items()}
