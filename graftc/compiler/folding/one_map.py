"""Build a Program with one linear map and its adaptations: the unfolded side of a fold that does not use the model.

The Builder writes the Program without values. The nodes that methods insert are then evaluated on the real rows of a
weight and the real tensors of an adapter. Nothing here uses a fold, and nothing is captured.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graftc.compiler.adapt.insert import adapt
from graftc.compiler.folding.probing import AdaptedGraph, MapProbe
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.resolve.sitetable import site_of
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.tensors import tensor_name
from graftc.passes.core.ir.eval_mode import to_eval
from graftc.passes.core.ir.program import InputSpec, OutputSpec, Program
from graftc.passes.core.ir.shapes import FakeContext
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import LinearSite, SiteKey, Use, linear_use
from graftc.passes.core.weights.names import AdapterName, parsed
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.base import MethodSpec
from graftc.specs.claims import FoldKind
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
_MAP = "map"
WEIGHT, BIAS = f"{_MAP}.weight", f"{_MAP}.bias"
"""Names of the map's tensors."""


@dataclass(frozen=True)
class OneMap:
    """A linear map of one size with its adaptations.

    Attributes:
        site: the site to fold at.
        probe: the map on random inputs; its results are compared in full.
        parts: the tensors that the graph reads in addition to the map's own, by name: parts of adaptations, and
            constants computed from rows of the base's weight (`RowWise.from_weight`).
        shapes: the shapes of the adaptations' parts; parts that all sites share, which have no module, have their
            smallest shape.
    """

    site: LinearSite
    probe: MapProbe
    parts: Mapping[str, AdapterName]
    shapes: Mapping[AdapterName, tuple[int, ...]]

    @property
    def slices(self) -> tuple[WeightSlice, WeightSlice]:
        """The slices of the weight and of the bias, even if the map has no bias."""
        return self.site.own, self.site.own.companion(BIAS)


def one_map(specs: Sequence[MethodSpec], rows: int, columns: int, *, bias: bool, lookup: bool) -> OneMap:
    """Build a map with adaptations.

    Args:
        specs: the adaptations, in order.
        rows, columns: the sizes of the weight.
        bias: whether the map has a bias.
        lookup: whether the weight is an embedding table, whose columns are its entries.

    Raises:
        GraftError: as for `compile_model`, for a spec that does not fit the sizes; GC050 for a method that does not
            fold; GC103 if an adaptation's nodes read more than the map.
    """
    store = Store()
    base = _without_adaptations(store, rows, columns, bias=bias, lookup=lookup)
    adapted = base.copy()
    use = _use_of(adapted)
    site = site_of(use, SiteKey(_MAP, "weight"), use.weight)
    constants: set[str] = set()
    for index, spec in enumerate(specs):
        item, method = Resolved(spec, ((site, spec),)), method_for(spec.method)
        try:
            if spec.claims.folds is FoldKind.NONE:
                raise GraftError("GC050", f"{item.name!r} cannot fold: no weight computes what {spec.method} does")
            adapt(Builder(adapted, store, item.name, spec.method), item)
        except GraftError as error:
            raise error.within(f"adapt[{index}]") from error
        if isinstance(method, RowWise):
            constants |= {tensor_name(site, item.name, part) for part in method.from_weight(spec, torch.ones(1, 1))}
    program = to_eval(adapted)
    read = (str(node.target) for node in program.graph.find_nodes(op="get_attr"))
    parts = {name: own for name in read if (own := parsed(name)) is not None}
    if unknown := sorted(parts.keys() - constants.union(*(each.parts.values() for each in site.applied))):
        message = f"{specs[0].name!r} reads {unknown[0]}, which depends on the whole model"
        raise GraftError("GC103", message)
    shapes = {own: tuple(store.get(name).shape) for name, own in parts.items() if name not in constants}
    probe = MapProbe(AdaptedGraph(program, copies=False), _use_of(base), torch.device("cpu"), large=math.inf)
    return OneMap(site, probe, parts, shapes)


def _without_adaptations(store: Store, rows: int, columns: int, *, bias: bool, lookup: bool) -> Program:
    """Return a Program with only the map, and add its tensors to a Store."""
    sizes = {WEIGHT: (columns, rows) if lookup else (rows, columns), **({BIAS: (rows,)} if bias else {})}
    for name, shape in sizes.items():
        value = torch.empty(shape, dtype=torch.float64, device="meta")
        store.add_parameter(name, value, trainable=False)
    graph, dtype = fx.Graph(), torch.int64 if lookup else torch.float64
    x = graph.placeholder("x")
    width = () if lookup else (columns,)
    x.meta.update(val=FakeContext().tensor(dtype, ("s0", *map(str, width)), torch.device("meta")), module="")
    output = graph.output((x,))
    program = Program(graph, (InputSpec("x", dtype, ("count", *width)),), OutputSpec("leaf"))
    build = Builder(program, store, "", "")
    weight, *rest = map(build.attribute, sizes)
    call = (aten.embedding.default, weight, x) if lookup else (aten.linear.default, x, weight, *rest)
    output.args = ((build.call(*call),),)
    for node in graph.nodes:  # nothing here belongs to an adaptation
        node.meta.pop("custom", None)
    return program


def _use_of(program: Program) -> Use:
    """Return the only map of a Program."""
    (use,) = filter(None, map(linear_use, program.graph.nodes))
    return use
