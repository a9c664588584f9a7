"""The unfolded side of the evidence: one linear map of a block's sizes, compiled with its adaptations without values.

The map is compiled like any model, on the meta device, so that what is evaluated is what a method inserts, on the real
rows of the weight and the real tensors of the adapter. None of this uses a fold.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.compiler.capture.signature import Axis
from graftc.compiler.folding.certify import Adapted
from graftc.compiler.folding.evaluating import evaluate
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.passes.core.method.capabilities import RowWise
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import LinearSite
from graftc.runtime.streaming.update import SiteUpdate
from graftc.specs.base import MethodSpec
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.target import Target

__all__ = ["BlockMap", "BlockMaps", "Chain"]

_MAP = "map"
Chain = Sequence[SiteUpdate]
"""The adaptations of one place, in order."""


class _OneMap(nn.Module):
    def __init__(self, rows: int, columns: int, *, bias: bool, lookup: bool) -> None:
        super().__init__()
        options: dict[str, Any] = {"dtype": torch.float64, "device": "meta"}
        module = nn.Embedding(columns, rows, **options) if lookup else nn.Linear(columns, rows, bias=bias, **options)
        self.add_module(_MAP, module)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = getattr(self, _MAP)(x)
        return result


def _at_map(update: SiteUpdate) -> MethodSpec:
    """Return the adaptation of the only map, without the biases that it trains, which are replaced elsewhere."""
    changes: dict[str, Any] = {"name": update.adaptation, "target": Target(modules=_MAP)}
    fields = type(update.spec).model_fields
    changes |= {"overrides": ()} if "overrides" in fields else {}
    changes |= {"bias": "none"} if getattr(update.spec, "bias", None) in ("all", "lora_only") else {}
    return update.spec.model_copy(update=changes)


@dataclass
class BlockMap:
    """A linear map of one size with its adaptations.

    Attributes:
        rows: the number of rows.
        site: the site to fold at; its sizes are the block's.
        shapes: shapes of every part that the graph reads, by adaptation; for parts that all sites share, the smallest
            ones.
        shared: names of the parts that all sites share, by adaptation.
    """

    rows: int
    site: LinearSite
    shapes: Mapping[str, Mapping[str, tuple[int, ...]]]
    shared: Mapping[str, frozenset[str]]
    _adapted: Adapted
    _parts: Mapping[str, tuple[str, str]]

    @cached_property
    def probes(self) -> dict[fx.Node, Tensor]:
        """Random inputs, the same for all blocks of these sizes."""
        return self.site.use.probe(torch.Generator().manual_seed(0))

    def unfolded(
        self,
        weight: Tensor,
        bias: Tensor | None,
        parts: Mapping[str, Mapping[str, Tensor]],
    ) -> Tensor:
        """Return the output of the adapted graph for the probes.

        Args:
            weight: rows of the base's weight, ``float64[rows, in]``.
            bias: the same rows of the bias.
            parts: the adaptations' tensors, cut to the block if they have its rows, and constants.
        """

        def tensor(name: str) -> Tensor:
            if name in self._parts:
                adaptation, part = self._parts[name]
                return parts[adaptation][part]
            return self._stored(name, weight, bias)

        values = {stage: value for node, value in self.probes.items() for stage in self._adapted.stages(node)}
        return evaluate(self._adapted.last(self.site.use.node), values, tensor)

    def plain(self, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return the output of the base's call for the probes, with a weight and a bias."""
        return evaluate(self.site.use.node, dict(self.probes), lambda name: self._stored(name, weight, bias))

    def _stored(self, name: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        if name == self.site.own.tensor:
            return self.site.own.restored(weight)
        assert bias is not None
        return bias


@dataclass
class BlockMaps:
    """Maps of all sizes that were requested, each compiled once."""

    _made: dict[str, BlockMap] = field(default_factory=dict)

    def of(self, chain: Chain, rows: int) -> BlockMap:
        """Return the map for a block of this many rows of a place.

        Raises:
            GraftError: as `compile_model`, for a spec that does not fit the sizes.
        """
        first = chain[0]
        specs = [_at_map(update) for update in chain]
        columns, bias = first.weight.in_features, first.bias is not None
        texts = [json.dumps(spec.model_dump(mode="json"), sort_keys=True) for spec in specs]
        key = json.dumps([rows, columns, bias, first.lookup, texts])
        if key not in self._made:
            self._made[key] = _compiled(specs, rows, columns, bias=bias, lookup=first.lookup)
        return self._made[key]


def _compiled(specs: Sequence[MethodSpec], rows: int, columns: int, *, bias: bool, lookup: bool) -> BlockMap:
    model = _OneMap(rows, columns, bias=bias, lookup=lookup)
    axis = Axis("x", torch.int64, ("count",)) if lookup else Axis("x", torch.float64, ("count", columns))
    compilation = compile_model(
        Spec(adapt=tuple(specs)), model, [axis], start=StartingPoint(use_cache=False, every_layer=True)
    )
    resolved = compilation.main.resolved
    eval_base = compilation.program("eval", "base")
    site = resolved[0].places[0][0]
    assert isinstance(site, LinearSite)
    named = {node.name: node for node in eval_base.graph.nodes}
    parts, shapes, shared = _parts(compilation, resolved, compilation.program("eval"))
    # Probing runs the base's own call, whose node in the eval graph has the same name as the site's in the train graph.
    site.use.node = named[site.use.node.name]
    return BlockMap(rows, site, shapes, shared, Adapted(compilation.program("eval")), parts)


def _parts(
    compilation: Any, resolved: Any, program: Any
) -> tuple[dict[str, tuple[str, str]], dict[str, Any], dict[str, frozenset[str]]]:
    """Return the tensors that the graph reads besides the map's own, the sizes of their parts, and the shared parts.

    Returns:
        The adaptation and part of each tensor; by adaptation, the sizes of its parts, and those that all sites share.
    """
    read = {str(node.target) for node in program.graph.nodes if node.op == "get_attr"}
    parts: dict[str, tuple[str, str]] = {}
    shapes: dict[str, dict[str, tuple[int, ...]]] = {}
    shared: dict[str, frozenset[str]] = {}
    for item in resolved:
        names_by_site: Mapping[Any, Mapping[str, str]] = compilation.parts.get(item.name, {})
        for own in names_by_site.values():
            for part, name in own.items():
                if name in read:
                    parts[name] = item.name, part
        method = method_for(item.spec.method)
        constants = method.from_weight(item.spec, torch.ones(1, 1)) if isinstance(method, RowWise) else {}
        prefix = f"{_MAP}.graftc.{item.name}."
        parts |= {prefix + part: (item.name, part) for part in constants if prefix + part in read}
        known = {name: part for name, (owner, part) in parts.items() if owner == item.name and part not in constants}
        shapes[item.name] = {part: tuple(compilation.store.get(name).shape) for name, part in known.items()}
        shared_parts = frozenset(part for name, part in known.items() if not name.startswith(f"{_MAP}."))
        shared[item.name] = shared_parts
    own_names = {f"{_MAP}.weight", f"{_MAP}.bias"}
    if unknown := sorted(read - parts.keys() - own_names):
        message = f"{resolved[0].name!r} reads {unknown[0]}, which follows from the whole model"
        raise GraftError("GC103", message)
    return parts, shapes, shared
