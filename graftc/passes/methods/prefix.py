"""Prefix tuning: trained keys and values prepended to an attention's own (Li and Liang 2021, arXiv:2101.00190)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor, fx

from graftc.passes.core.build.base_activations import read_tokens
from graftc.passes.core.build.builder import Builder, Initialiser
from graftc.passes.core.ir.program import above, gives_tensors
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.method.capabilities import Collapsing, Exchangeable
from graftc.passes.core.method.lowrank import normal, uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import AttentionOperands, AttentionSite, Positions, SiteKey
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.prefix import Prefix, PrefixSpec

aten = torch.ops.aten
_SUMS = aten.cumsum.default
_COUNTING = (aten.arange.default, aten.arange.start, aten.arange.start_step, _SUMS)
_BY_ELEMENT = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor)


S = TypeVar("S", bound=PrefixSpec)


class _FirstValues:
    """The base's keys and values for the initial tokens, computed for all places at once on first use."""

    def __init__(self, spec: PrefixSpec, sites: Sequence[AttentionSite], build: Builder) -> None:
        self._spec, self._sites, self._build = spec, sites, build

    @cached_property
    def _values(self) -> dict[SiteKey, dict[str, Tensor]]:
        operands = [_operands(site) for site in self._sites]
        nodes = [node for own in operands for node in (own.keys, own.values)]
        computed = read_tokens(self._build.program, self._build.store, self._spec.init_tokens, nodes)
        pairs = zip(self._sites, computed[::2], computed[1::2], strict=True)
        return {site.key: {"keys": keys, "values": values} for site, keys, values in pairs}

    def initialiser(self, site: AttentionSite, part: str) -> Initialiser:
        """Return an initialiser that copies the base's keys or values at a place, ``[length, width]``."""
        columns = site.keys if part == "keys" else site.values
        assert columns is not None

        def fill(tensor: Tensor, generator: torch.Generator) -> None:
            values = self._values[site.key][part][0].transpose(0, 1).float().cpu()  # [length, heads, width]
            tensor[:, columns.flatten()] = values.flatten(1)

        return fill


@dataclass(frozen=True)
class Shared:
    """The state that all places of a prefix share.

    Attributes:
        first: the initial keys and values, if they come from tokens.
        hidden: the hidden layer of the reparameterisation; None if there is no reparameterisation.
    """

    first: _FirstValues
    hidden: fx.Node | None = None


class PrefixedAttention(Method[S, AttentionSite], Collapsing[S], Exchangeable[S]):
    """``softmax(q [P; K]^T) [U; V]`` with ``P: [length, key width]`` and ``U: [length, value width]``; each head uses
    its own columns (arXiv:2101.00190; without a reparameterisation, P-tuning v2, arXiv:2110.07602).

    With a reparameterisation, ``[P, U] = W2 tanh(W1 E + b1) + b2``, where each place has its own ``W2`` and ``b2``.
    """

    least = 0

    def prepare(self, spec: S, sites: Sequence[AttentionSite], build: Builder) -> Shared:
        """Shift the text's positions past the prefix if requested, and build the hidden layer of a reparameterisation.

        All places read that layer.

        Raises:
            GraftError: GC020 if the prefix length differs between places despite a reparameterisation or shifted
                positions, or if a table has no position left for the text.
        """
        first = _FirstValues(spec, sites, build)
        if spec.positions == "shifted":
            _same_lengths(spec, "with shifted positions, prefixes must have the same length at every place")
            for positions in _own_positions(sites):
                _check_table(spec, positions)
                build.shift(positions, spec.length)
        own = spec.reparameterization
        if own is None:
            return Shared(first)
        _same_lengths(spec, "with a reparameterisation, prefixes must have the same length at every place")
        width, dtype = own.width or _width(sites[0]), _operands(sites[0]).keys.meta["val"].dtype
        vectors = build.parameter("vectors", (spec.length, width), normal(spec.init_std), dtype=dtype)
        weight = build.parameter("hidden", (own.hidden, width), uniform, dtype=dtype)
        bias = build.parameter("hidden_bias", (own.hidden,), zeros, dtype=dtype)
        hidden = build.linear(vectors, weight, bias, "hidden")
        return Shared(first, build.call(aten.tanh.default, hidden, part="hidden"))

    def insert(self, spec: S, site: AttentionSite, shared: Shared, build: Builder) -> None:
        """Prepend the prefix to the attention's keys and values.

        Raises:
            GraftError: GC017 if the form of the attention, or of its keys, does not support a prefix.
        """
        own = _operands(site)
        assert site.keys is not None and site.values is not None
        prefix = []
        heads = (("keys", site.keys, own.keys), ("values", site.values, own.values))
        for part, columns, like in heads:
            table = _table(spec, site, build, part, int(columns.max()) + 1, shared, like.meta["val"].dtype)
            prefix.append(build.batched(_headed(build, build.dropout(table, spec.dropout), columns, part), like, part))
        build.attend(site, *prefix, window=spec.window)

    def fold(self, spec: S, site: AttentionSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since its contribution to the softmax depends on the query."""
        return Keep("the contribution of its keys and values depends on the query, so no weight can contain it")

    def collapse(self, spec: S) -> MethodSpec | None:
        """Return the spec with trained keys and values instead of a network that computes them; None if it has none."""
        if spec.reparameterization is None:
            return None
        kept = ("name", "target", "length", "positions", "window", "dropout", "overrides")
        return type(spec)(**{field: getattr(spec, field) for field in kept})

    def collapsed(self, spec: S, tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the keys and values that the network computes."""
        hidden = torch.tanh(tensors["vectors"] @ tensors["hidden"].T + tensors["hidden_bias"])
        return {p: hidden @ tensors[f"{p}_out"].T + tensors[f"{p}_out_bias"] for p in ("keys", "values")}

    def exchangeable(self, spec: S, size: int) -> MethodSpec:
        """Return a prefix of this length without a network; with length 0, attention is the base's own."""
        return type(spec)(
            length=size, **{f: getattr(spec, f) for f in ("name", "target", "dtype", "positions", "window")}
        )


class PrefixMethod(PrefixedAttention[Prefix]):
    """`PrefixedAttention` without changes."""


def _same_lengths(spec: PrefixSpec, reason: str) -> None:
    if {override.length for override in spec.overrides} - {None, spec.length}:
        hint = "remove the overrides of length"
        raise GraftError("GC020", reason, place=Place(path="overrides"), hint=hint)


def _own_positions(sites: Sequence[AttentionSite]) -> list[Positions]:
    """Return the positions of the streams in which the sites self-attend, as read by the first layer of each stream.

    Raises:
        GraftError: GC017 if a stream has positions that no call reads as integers.
    """
    first: dict[str, AttentionSite] = {}
    for site in sites:
        if not site.crosses and (site.stack not in first or (site.layer or 0) < (first[site.stack].layer or 0)):
            first[site.stack] = site
    for site in first.values():
        if not site.positions and (source := _positional(site)) is not None:
            message = f"queries of {site.key} depend on positions through {source.name}, which cannot be shifted"
            raise GraftError("GC017", message, place=Place(path="positions"), hint="use positions: unshifted")
    return list(dict.fromkeys(positions for site in first.values() for positions in site.positions))


def _positional(site: AttentionSite) -> fx.Node | None:
    """Return the node that makes an attention's queries and keys depend on token positions, or None.

    The node counts tokens, or adds stored values, one for each position. Masks and distances are ignored, since they
    account for a prefix by themselves, and so are values stored for the fixed places of an input without text, such as
    the patches of an image.
    """
    own = _operands(site)
    length = None if site.read is None else expression(site.read.meta["val"].shape[1])
    data: set[fx.Node] = set()
    nodes = above([own.query, own.keys])
    text = any(node.op == "placeholder" and not node.meta["val"].is_floating_point() for node in nodes)
    for node in nodes:
        sources = list(filter(gives_tensors, node.all_input_nodes))
        if node.target in _COUNTING and not (node.target is _SUMS and node.meta["val"].is_floating_point()):
            return node
        if node.op == "placeholder" or any(source in data for source in sources):
            fixed = [source for source in sources if source not in data and isinstance(source.meta["val"], Tensor)]
            stored = [source for source in fixed if source.meta["val"].dim() > 1]
            for source in stored if node.target in _BY_ELEMENT else ():
                if expression(source.meta["val"].shape[-2]) == length != 1 and (text or not _is_whole(source)):
                    return source
            data.add(node)
    return None


def _is_whole(value: fx.Node) -> bool:
    """Return whether a value covers all places of the stored tensor that it comes from."""
    places = value.meta["val"].shape[-2]
    while value.op == "call_function" and len(value.all_input_nodes) == 1:
        (value,) = value.all_input_nodes
    stored = value.meta["val"]
    return value.op == "get_attr" and stored.dim() > 1 and stored.shape[-2] == places


def _check_table(spec: PrefixSpec, positions: Positions) -> None:
    rows = positions.rows
    if rows is not None and spec.length >= rows:
        table = positions.table
        assert table is not None
        message = f"a prefix of {spec.length} leaves none of the {rows} positions of {table.target} for the text"
        raise GraftError("GC020", message, place=Place(path="length"), hint="use positions: unshifted")


def _operands(site: AttentionSite) -> AttentionOperands:
    if site.operands is None:
        message = f"the keys of {site.key} cannot be traced head by head"
        raise GraftError("GC017", message, hint="leave it out with exclude")
    return site.operands


def _width(site: AttentionSite) -> int:
    """Return the width of the queries, or of the keys if the attention is written out with queries of another shape."""
    query = _operands(site).query.meta["val"]
    assert site.keys is not None
    return int(query.shape[1]) * int(query.shape[3]) if query.dim() == 4 else site.keys.numel()


def _table(
    spec: PrefixSpec, site: AttentionSite, build: Builder, part: str, width: int, shared: Shared, dtype: torch.dtype
) -> fx.Node:
    """Build the node that computes keys or values, ``[length, width]``."""
    if shared.hidden is None:
        init = shared.first.initialiser(site, part) if spec.init_tokens else normal(spec.init_std)
        return build.parameter(part, (spec.length, width), init, dtype=dtype)
    own = spec.reparameterization
    assert own is not None
    weight = build.parameter(f"{part}_out", (width, own.hidden), uniform, dtype=dtype)
    return build.linear(shared.hidden, weight, build.parameter(f"{part}_out_bias", (width,), zeros, dtype=dtype), part)


def _headed(build: Builder, table: fx.Node, columns: Tensor, part: str) -> fx.Node:
    """Reshape a table of ``[..., length, width]`` to ``[..., heads, length, head width]``."""
    heads, width = columns.shape
    if not torch.equal(columns.flatten(), torch.arange(columns.numel())):
        index = build.numbers(f"{part}_columns", columns.flatten())
        table = build.call(aten.index_select.default, table, -1, index, part=part)
    split = build.call(aten.unflatten.int, table, -1, [heads, width], part=part)
    return build.call(aten.transpose.int, split, -2, -3, part=part)
