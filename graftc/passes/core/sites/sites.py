"""Sites: typed views of the places in one Program that a method can adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, fx

from graftc.passes.core.sites.readers import linear_use
from graftc.passes.core.sites.uses import Use
from graftc.passes.core.weights.folds import Fold
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.site_key import SiteKey
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.roles import parse_role

__all__ = [
    "Applied",
    "AttentionOperands",
    "AttentionSite",
    "EmbeddingSite",
    "ExpertsSite",
    "LinearSite",
    "NormSite",
    "ParameterSite",
    "Site",
    "SiteKey",
    "SublayerSite",
    "TokenNumbers",
    "Use",
    "ValueSite",
    "linear_use",
    "unsupported",
]


def _dtype(node: fx.Node) -> torch.dtype:
    return cast("torch.dtype", node.meta["val"].dtype)


@dataclass(eq=False)
class Site:
    """A place in one Program that a method can adapt.

    Attributes:
        key: the site's key, the same in every Program.
        roles: its roles in the architecture, most specific first; empty if only its name is known.
        layer: index of its layer; None outside the layers.
        stack: path of the layer list to which it belongs.
    """

    key: SiteKey
    roles: tuple[str, ...] = ()
    layer: int | None = None
    stack: str = ""
    kind: SiteKind = field(default=SiteKind.VALUE, kw_only=True)

    @property
    def is_head(self) -> bool:
        """Whether the site is a head, which produces the outputs."""
        return any(parse_role(role).name == "head" for role in self.roles)

    @property
    def scope(self) -> str:
        """The name part that distinguishes its tensors from those of other sites in its module; empty if not needed."""
        return ""


def unsupported(site: Site, reason: str, hint: str | None = "leave it out with exclude") -> GraftError:
    """Return the error (GC017) for a site that does not support an adaptation; the reason follows the site's name."""
    return GraftError("GC017", f"{site.key} {reason}", hint=hint)


@dataclass(frozen=True)
class Applied:
    """The insertion of one adaptation at a site.

    Attributes:
        adaptation: the adaptation's name.
        fold: a function that returns the adaptation's fold at the site, given its tensors by part.
        parts: the Store names of these tensors, by part.
    """

    adaptation: str
    fold: Callable[[Mapping[str, Tensor]], Fold]
    parts: Mapping[str, str]


@dataclass(eq=False)
class LinearSite(Site):
    """Rows of a linear map.

    Orientation, fusion, convolution and bias are hidden: the weight is always the site's own rows of ``[out, in]``.

    Attributes:
        use: the map in this Program.
        own: the site's own rows of the stored weight.
        applied: the adaptations inserted at the site so far, in order.
    """

    use: Use = field(kw_only=True)
    own: WeightSlice = field(kw_only=True)
    applied: list[Applied] = field(default_factory=list, kw_only=True)

    @property
    def scope(self) -> str:
        """The name of the weight; empty if it is ``weight``.

        A module may have several weights, such as experts or `nn.MultiheadAttention`.
        """
        return "" if self.key.name == "weight" else self.key.name

    @property
    def own_bias(self) -> WeightSlice | None:
        """The site's own entries of the bias; None if there is none."""
        return None if self.use.bias is None else self.use.bias.at(self.own.rows)

    @property
    def slices(self) -> tuple[WeightSlice, ...]:
        """The slices of stored tensors that belong to the site: the weight's and, if there is a bias, the bias's."""
        return (self.own,) if self.own_bias is None else (self.own, self.own_bias)

    @property
    def columns(self) -> WeightSlice:
        """The site's own rows among those of the use; they correspond to its own columns of the output."""
        return self.own.within(self.use.weight)

    @property
    def leading(self) -> tuple[int, ...]:
        """The sizes of the axes before ``out`` and ``in``; empty except for experts."""
        return self.use.leading

    @property
    def in_features(self) -> int:
        """The input's width; for a convolution, the number of entries in a patch; for a table, its number of rows."""
        return self.use.in_features

    @property
    def out_features(self) -> int:
        """The number of the site's own rows, which equals the width of its output."""
        return self.own.count

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the result."""
        return _dtype(self.use.node)


@dataclass(eq=False)
class ExpertsSite(LinearSite):
    """The matrices of all experts, ``[experts, out, in]``: one linear map per expert, along a leading axis."""

    @property
    def experts(self) -> int:
        """The number of experts."""
        return self.use.leading[0]


@dataclass(eq=False)
class EmbeddingSite(LinearSite):
    """An embedding table, as a linear map of one-hot vectors: ``in`` is its number of rows, ``out`` its width."""


@dataclass(frozen=True)
class Positions:
    """A call that reads the positions of tokens as integers.

    Attributes:
        reader: the call.
        index: the index of the argument that contains the positions; if not 0, argument 0 is the table of a look-up.
    """

    reader: fx.Node
    index: int

    @property
    def numbers(self) -> fx.Node:
        """The node of the positions."""
        argument = self.reader.args[self.index]
        numbers = argument[0] if isinstance(argument, list | tuple) else argument
        assert isinstance(numbers, fx.Node)
        return numbers

    @property
    def table(self) -> fx.Node | None:
        """The table in which positions are looked up; None if the call computes with them instead."""
        table = self.reader.args[0] if self.index else None
        return table if isinstance(table, fx.Node) else None

    @property
    def rows(self) -> int | None:
        """The number of positions in the table if it is a stored tensor, otherwise None."""
        return None if self.table is None or self.table.op != "get_attr" else self.size

    @property
    def size(self) -> int | None:
        """The number of positions in the table, whether it is stored or computed; None without a table."""
        if self.table is None:
            return None
        axis: Any = self.reader.args[1] if self.index > 1 else 0
        return int(self.table.meta["val"].shape[axis])


@dataclass(frozen=True)
class AttentionOperands:
    """The operands of an attention computation.

    Attributes:
        query: the queries, as read by the fused call or by the product that computes scores.
        keys, values: ``[rows, heads, keys, width]``: the keys and values as a fused call reads them; if the computation
            is not fused, the nearest nodes above the products that have this layout.
    """

    query: fx.Node
    keys: fx.Node
    values: fx.Node


@dataclass(eq=False)
class AttentionSite(Site):
    """An attention computation.

    Attributes:
        node: the call that computes the heads, before the output projection.
        keys, values: ``int64[heads, width]``: the columns of the projected keys and values that belong to each head,
            numbered from 0; heads that share keys list the same columns. None if they cannot be traced.
        operands: the values that contain these columns; None if `keys` is None.
        positions: the calls from which its input's positions originate; in later layers, also the calls for other
            streams.
        read: the value that its sublayer reads and from which queries are computed; None if it is not in a sublayer.
    """

    node: fx.Node = field(kw_only=True)
    keys: Tensor | None = field(default=None, kw_only=True)
    values: Tensor | None = field(default=None, kw_only=True)
    operands: AttentionOperands | None = field(default=None, kw_only=True)
    positions: tuple[Positions, ...] = field(default=(), kw_only=True)
    read: fx.Node | None = field(default=None, kw_only=True)

    @property
    def crosses(self) -> bool:
        """Whether queries and keys come from different streams."""
        return any("cross" in parse_role(role).prefixes for role in self.roles)

    @property
    def scope(self) -> str:
        """``cross_attn`` if queries and keys come from different streams, otherwise ``attn``."""
        return "cross_attn" if self.crosses else "attn"


def with_heads_of(own: AttentionSite, other: AttentionSite) -> AttentionSite:
    """Return an attention site with the columns of another Program's heads at this place.

    If keys come from a cache, the Program itself does not show their source. Only one of the Programs may repeat
    keys for the queries of a group.
    """
    operands = own.operands
    if operands is None and own.node.target is torch.ops.aten.scaled_dot_product_attention.default:
        operands = AttentionOperands(*cast("tuple[fx.Node, fx.Node, fx.Node]", own.node.args[:3]))
    if operands is None or other.keys is None or other.values is None:
        return replace(own, keys=other.keys, values=other.values)
    keys, values = _repeated(other.keys, operands.keys), _repeated(other.values, operands.values)
    return replace(own, keys=keys, values=values, operands=operands)


def _repeated(columns: Tensor, operand: fx.Node) -> Tensor:
    """Return the columns of each head, ``[heads, width]``, for an operand ``[rows, heads, tokens, width]``."""
    known, heads = columns.shape[0], operand.meta["val"].shape[1]
    return columns[:: known // heads] if heads < known else columns.repeat_interleave(heads // known, 0)


@dataclass(eq=False)
class NormSite(Site):
    """The scale and the shift of a normalisation layer.

    Attributes:
        node: the call that applies the scale.
        weight, bias: the Store names of scale and shift; bias is None if there is no shift.
    """

    node: fx.Node = field(kw_only=True)
    weight: str = field(kw_only=True)
    bias: str | None = field(default=None, kw_only=True)


@dataclass(eq=False)
class SublayerSite(Site):
    """A residual branch and its addition: attention, a feed-forward network, or both in parallel.

    Attributes:
        stream: the residual input.
        normed: the value that the sublayer reads: the output of the norm before it, or the stream itself.
        inner: the value that the last linear map reads: the attention heads or the feed-forward network's inner
            activation; None if the branch ends in more than one map.
        projection: the last linear map's result, before dropout.
        branch: the addend, after dropout, scaling and any norm within the branch.
        sum: the addition.
        post_norm: the norm of the sum, if there is one.
        output: the value from which the next sublayer starts: `post_norm` or `sum`.
    """

    stream: fx.Node = field(kw_only=True)
    normed: fx.Node = field(kw_only=True)
    inner: fx.Node | None = field(default=None, kw_only=True)
    projection: fx.Node = field(kw_only=True)
    branch: fx.Node = field(kw_only=True)
    sum: fx.Node = field(kw_only=True)
    post_norm: fx.Node | None = field(default=None, kw_only=True)
    output: fx.Node = field(kw_only=True)

    @property
    def scope(self) -> str:
        """``attn``, ``cross_attn``, ``ffn``, or ``attn_ffn`` for a branch with both."""
        names = (parse_role(role) for role in self.roles)
        words = ("_".join((*(p for p in r.prefixes if p == "cross"), r.name.partition(".")[0])) for r in names)
        return "_".join(words)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the branch."""
        return _dtype(self.branch)


@dataclass(frozen=True)
class TokenNumbers:
    """The token ids with which an embedding table is indexed.

    Attributes:
        numbers: the ids, integers of shape ``[batch, sequence]``.
        entries: the number of tokens in the table.
    """

    numbers: fx.Node
    entries: int


@dataclass(eq=False)
class ValueSite(Site):
    """An activation that is identified by its place: the input or the output of a layer.

    The output of one layer and the input of the next are a single value with two sites.

    Attributes:
        node: the value, ``[batch, sequence, width]`` in most models.
        tokens: the token ids that its stack of layers reads; None if the value is not computed from tokens.
    """

    node: fx.Node = field(kw_only=True)
    tokens: TokenNumbers | None = field(default=None, kw_only=True)

    @property
    def scope(self) -> str:
        """``layer_in`` or ``layer_out``."""
        return parse_role(self.roles[0]).name.replace(".", "_")

    @property
    def width(self) -> int:
        """The number of entries per token."""
        return int(self.node.meta["val"].shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the value."""
        return _dtype(self.node)


@dataclass(eq=False)
class ParameterSite(Site):
    """A whole base tensor.

    Attributes:
        tensor: its Store name.
    """

    tensor: str = field(kw_only=True)
