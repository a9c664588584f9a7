"""Compositions of adaptations' additions at one place: averages, AdapterFusion, spans of the sequence, gates.

Each adaptation is built as usual, from the same values of the model, by a builder that collects its additions instead
of making them. A composition combines them into one addition. A gate also applies to the keys and values of a prefix.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional

from graftc.passes.core.build.batch import Batch
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.nodes import Nodes, Seams
from graftc.passes.core.build.requests import Change, NewTensor, Window
from graftc.passes.core.build.token_masks import token_mask
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.method.capabilities import Reading
from graftc.passes.core.method.lowrank import normal, zeros
from graftc.passes.core.method.steering import TensorObjective
from graftc.passes.core.sites.sites import AttentionSite, LinearSite, Site, SublayerSite
from graftc.specs.compose import Average, CompositionSpec, Fuse, Gate, Split
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
GATE = ("gate", "gate_bias")
"""Part names of the tensors of an adaptation's gate, which do not belong to its method."""


GATE_READING = Reading(
    "gate",
    GATE[0],
    (aten.linear.default, functional.linear),  # code may call either
    lambda _, scores: scores.detach().float().sigmoid().mean(),
)
"""The reading of a gate: its mean value in a forward pass, over rows and all of their tokens."""


@dataclass(frozen=True)
class Delta:
    """The addition that one adaptation would make at a site.

    Attributes:
        node: the addition; its last axis has the width of the value that it is added to.
        read: the value that it was computed from.
        place: the names of the sublayer's values that it is added to and was computed from; None at a linear map.
    """

    node: fx.Node
    read: fx.Node
    place: tuple[str, str] | None


@dataclass(frozen=True)
class Ahead:
    """Keys and values that an adaptation would put before those of an attention: ``[rows, heads, length, width]``."""

    keys: fx.Node
    values: fx.Node
    window: Window


class Collecting(Seams):
    """The seams of an adaptation whose additions are collected instead of made.

    Args:
        into: the name of the composition.
        trains: whether the adaptation's own tensors are trained.
        attends: whether the composition also accepts keys and values.
    """

    composed = True

    def __init__(self, into: str, *, trains: bool = True, attends: bool = False) -> None:
        self.into, self.trains, self.attends = into, trains, attends
        self.deltas: list[Delta] = []
        self.ahead: list[Ahead] = []

    def make(self, nodes: Nodes, new: NewTensor) -> Sequence[str]:
        """Create a tensor that is trainable only if the adaptation is trained.

        Raises:
            GraftError: GC036 for a trained copy of a base tensor, since only additions can be composed.
        """
        if new.kind == "copy":
            raise self._refusal(nodes, f"it trains {new.base} itself")
        return super().make(nodes, replace(new, trainable=new.trainable and self.trains))

    def write(self, nodes: Nodes, change: Change, put: Callable[..., None]) -> None:
        """Collect an addition instead of making it.

        Raises:
            GraftError: GC036 for every other change, except changes to positions and, if the composition accepts them,
                to keys.
        """
        if change.kind == "sum":
            (delta,) = change.given
            assert change.source is not None
            self.deltas.append(Delta(delta, change.source(), change.place))
        elif change.kind == "keys" and self.attends:
            keys, values = change.given
            self.ahead.append(Ahead(keys, values, change.window))
        elif change.kind == "positions":
            super().write(nodes, change, put)
        else:
            raise self._refusal(nodes, _CHANGES[change.kind])

    def _refusal(self, nodes: Nodes, reason: str) -> GraftError:
        return GraftError(
            "GC036",
            f"{nodes.adaptation!r} ({nodes.method}) does not only add to values, so {self.into!r} cannot "
            f"compose it: {reason}",
            hint="compose methods that add to a value: lora, and bottleneck adapters of every kind; a gate also "
            "accepts a prefix",
        )


_CHANGES: Mapping[str, str] = {
    "output": "it replaces the map's result",
    "input": "it changes the map's input",
    "keys": "it puts keys and values in front of an attention's own",
    "value": "it replaces a value of a layer",
    "tokens": "it fills virtual tokens",
    "tensor": "it replaces a tensor of the base",
}
"""Why a change cannot be composed, by kind of change."""


@dataclass(frozen=True)
class Member:
    """One adaptation of a composition.

    Attributes:
        build: the builder of the adaptation.
        added: the collected additions.
    """

    build: Builder
    added: Collecting


def composed(into: Builder, adaptation: str, method: str, *, trains: bool = True, attends: bool = False) -> Member:
    """Return an adaptation as a member of the composition of ``into``; see `Collecting`."""
    added = Collecting(into.adaptation, trains=trains, attends=attends)
    return Member(into.within(added, adaptation, method), added)


Combine = Callable[[Any, Builder, Sequence[tuple[Builder, Delta]]], fx.Node]


def insert_composed(spec: CompositionSpec, build: Builder, site: Site, members: Sequence[Member]) -> None:
    """Add the value that a composition computes from its members' additions at ``site``.

    Args:
        spec: the composition.
        build: the builder of the composition, at ``site``.
        site: a linear map or a sublayer; for a gate, possibly an attention.
        members: the members that adapt the site.

    Raises:
        GraftError: GC036 if members do not read from and add to the same values.
    """
    if isinstance(site, AttentionSite):
        assert isinstance(spec, Gate)
        for each in members:
            for ahead in each.added.ahead:
                gate_attention(spec, each.build, build, site, ahead)
            each.added.ahead = []
        return
    deltas = [(each.build, delta) for each in members for delta in each.added.deltas]
    for each in members:
        each.added.deltas = []
    places = {delta.place for _, delta in deltas}
    if len(places) > 1:
        names = ", ".join(each.build.adaptation for each in members)
        message = f"{names} do not all read from and add to the same values of {site.key}"
        raise GraftError("GC036", message, hint="compose adapters of one kind")
    total = _COMBINE[type(spec)](spec, build, deltas)
    (place,) = places
    if isinstance(site, LinearSite):
        build.add(site, total, spec.kind)
    else:
        assert isinstance(site, SublayerSite) and place is not None
        build.add_at(site, place[0], total, place[1])


def _average(spec: Average, build: Builder, deltas: Sequence[tuple[Builder, Delta]]) -> fx.Node:
    terms = [
        build.call(aten.mul.Tensor, delta.node, factor, part="average")
        for (_, delta), factor in zip(deltas, spec.factors, strict=True)
    ]
    return _sum(build, terms, "average")


def _split(spec: Split, build: Builder, deltas: Sequence[tuple[Builder, Delta]]) -> fx.Node:
    batch = Batch(build)
    where = str(build.site.key)
    own = [batch.first(delta.node, where) for _, delta in deltas]
    if own[0].meta["val"].dim() < 3:
        message = f"{where} has one value for each row, but no sequence to split"
        raise GraftError("GC036", message, hint="leave it out of the targets")
    column = build.call(aten.slice.Tensor, own[0], -1, 0, 1, part="positions")
    ones = build.call(aten.ones_like.default, column, dtype=torch.int64, part="positions")
    numbers = build.call(aten.cumsum.default, ones, 1, part="positions")  # from 1
    result = own[-1]
    for start, delta in reversed(list(zip(spec.at, own[:-1], strict=True))):
        inside = build.call(aten.le.Scalar, numbers, start, part="span")
        result = build.call(aten.where.self, inside, delta, result, part="span")
    return batch.home(result, deltas[0][1].node)


def _gate(spec: Gate, build: Builder, deltas: Sequence[tuple[Builder, Delta]]) -> fx.Node:
    return _sum(build, [gated(spec, own, delta) for own, delta in deltas], "gates")


def gated(spec: Gate, build: Builder, delta: Delta) -> fx.Node:
    """Return ``delta`` times its adaptation's gate at the site; the gate has one value for each row of the batch."""
    batch = Batch(build)
    where = str(build.site.key)
    x, own = batch.first(delta.read, where), batch.first(delta.node, where)
    gate = mean_gate(spec, build, x)
    for _ in range(own.meta["val"].dim() - 2):
        gate = build.call(aten.unsqueeze.default, gate, 1, part="gate")
    return batch.home(build.call(aten.mul.Tensor, own, gate, part="gated"), delta.node)


def gate_attention(spec: Gate, own: Builder, build: Builder, site: AttentionSite, ahead: Ahead) -> None:
    """Put keys and values in front of an attention's own, both multiplied by a gate computed from its input.

    Args:
        spec: the gate's spec, which determines the tokens over which the gate averages.
        own: the builder that creates the gate's tensors.
        build: the builder that changes the attention.
        site: the attention.
        ahead: the keys and values.

    Raises:
        GraftError: GC036 if the attention's rows differ from the batch's, as in windowed attention.
    """
    batch = Batch(build)
    gate = mean_gate(spec, own, batch.first(build.attended(site), str(site.key)))
    if expression(ahead.keys.meta["val"].shape[0]) != expression(batch.size):
        message = f"the keys of {site.key} have different rows from the batch, so a gate for each row does not apply"
        raise GraftError("GC036", message, hint="leave it out of the target")
    for _ in range(2):
        gate = build.call(aten.unsqueeze.default, gate, 1, part="gate")
    keys, values = (build.call(aten.mul.Tensor, n, gate, part="gated") for n in (ahead.keys, ahead.values))
    build.attend(site, keys, values, window=ahead.window)


def mean_gate(spec: Gate, build: Builder, x: fx.Node) -> fx.Node:
    """Return ``mean sigmoid(w x + b)`` over the tokens of ``x: [rows, ..., width]``, as ``[rows, 1]``."""
    value = x.meta["val"]
    existing = build.parts.get(build.site.key, {}).get(GATE[0])
    if existing is not None and tuple(build.store.get(existing).shape) != (1, int(value.shape[-1])):
        message = f"{build.adaptation!r} ({build.method}) already has a tensor named {GATE[0]!r}, as a gate needs"
        raise GraftError("GC036", message, hint="average its outputs, or compose another method with a gate")
    weight = build.parameter(GATE[0], (1, int(value.shape[-1])), normal(0.02), dtype=value.dtype)
    bias = build.parameter(GATE[1], (1,), zeros, dtype=value.dtype)
    scores = build.call(aten.sigmoid.default, build.linear(x, weight, bias, "gate"), part="gate")
    axes = list(range(1, value.dim() - 1))
    return token_mean(build, scores, axes, real=spec.tokens == "real") if axes else scores


def token_mean(build: Builder, scores: fx.Node, axes: Sequence[int], *, real: bool) -> fx.Node:
    """Return the mean of ``scores: [rows, ..., width]`` over some axes.

    Args:
        build: the builder.
        scores: the values.
        axes: the axes; all axes of tokens are among them.
        real: whether the tokens that the attention mask excludes do not count, if there is a mask for these tokens.
    """
    dtype, axes = scores.meta["val"].dtype, list(axes)
    sizes = [expression(size) for size in scores.meta["val"].shape[:-1]]
    mask = token_mask(build, sizes) if real else None
    if mask is None:
        return build.call(aten.mean.dim, scores, axes, part="gate")
    counted = build.call(aten.unsqueeze.default, build.call(aten.to.dtype, mask, dtype, part="tokens"), -1)
    own = build.call(aten.mul.Tensor, scores, counted, part="gate")
    total = build.call(aten.sum.dim_IntList, own, axes, part="gate")
    count = build.call(aten.clamp_min.default, build.call(aten.sum.dim_IntList, counted, axes, part="tokens"), 1.0)
    return build.call(aten.div.Tensor, total, count, part="gate")


def _fuse(spec: Fuse, build: Builder, deltas: Sequence[tuple[Builder, Delta]]) -> fx.Node:
    """Return ``V sum_i p_i d_i`` with ``p = softmax_i((Q x + q) (K d_i + k) / T)``.

    The value projection is linear, so it is applied last.
    """
    read = deltas[0][1].read
    value = deltas[0][1].node.meta["val"]
    width, inner, dtype = int(value.shape[-1]), int(read.meta["val"].shape[-1]), value.dtype
    query = build.linear(read, *_projection(build, "query", width, inner, dtype), "query")
    if query.meta["val"].dim() != value.dim():
        raise GraftError("GC036", f"the value read at {build.site.key} has different axes from the value added there")
    stacked = build.call(aten.stack.default, [delta.node for _, delta in deltas], -2, part="added")
    keys = build.linear(stacked, *_projection(build, "key", width, width, dtype), "key")
    across = build.call(aten.transpose.int, keys, -1, -2, part="scores")
    row_of_queries = build.call(aten.unsqueeze.default, query, -2, part="scores")
    scores = build.call(aten.squeeze.dim, build.call(aten.matmul.default, row_of_queries, across, part="scores"), -2)
    if spec.temperature != 1:
        scores = build.call(aten.div.Tensor, scores, spec.temperature, part="scores")
    weights = build.call(aten.softmax.int, build.dropout(scores, spec.dropout), -1, part="weights")
    row = build.call(aten.unsqueeze.default, weights, -2, part="fused")
    fused = build.call(aten.squeeze.dim, build.call(aten.matmul.default, row, stacked, part="fused"), -2)
    if not spec.values:
        return fused
    return build.linear(fused, build.parameter("value", (width, width), _near_identity, dtype=dtype), None, "value")


def _projection(build: Builder, part: str, out: int, into: int, dtype: torch.dtype) -> tuple[fx.Node, fx.Node]:
    weight = build.parameter(part, (out, into), normal(0.02), dtype=dtype)
    return weight, build.parameter(f"{part}_bias", (out,), zeros, dtype=dtype)


def _near_identity(tensor: Tensor, generator: torch.Generator) -> None:
    tensor.fill_(1e-6).fill_diagonal_(1)


def _sum(build: Builder, terms: Sequence[fx.Node], part: str) -> fx.Node:
    total = terms[0]
    for term in terms[1:]:
        total = build.call(aten.add.Tensor, total, term, part=part)
    return total


_COMBINE: dict[type[CompositionSpec], Combine] = {Average: _average, Split: _split, Gate: _gate, Fuse: _fuse}


class FusionObjective(TensorObjective[Any]):
    """``regularization * sum |V - I|^2`` over the value matrices (Pfeiffer et al. 2021)."""

    def value(self) -> Tensor:
        """Return the term, summed over all places."""
        terms = []
        for place in self.places:
            matrix = place.tensors["value"]
            terms.append((matrix - torch.eye(matrix.shape[0], dtype=matrix.dtype, device=matrix.device)).square().sum())
        result: Tensor = self.spec.regularization * torch.stack(terms).sum()
        return result
