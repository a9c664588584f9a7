"""Sites: typed views of the places in one Program that a method can adapt."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.sites.readers import linear_use
from graftc.passes.core.sites.uses import Use
from graftc.passes.core.weights.folds import Fold
from graftc.passes.core.weights.site_key import SiteKey
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.claims import SiteKind
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
]


@dataclass(eq=False)
class Site:
    """A place in one Program.

    Attributes:
        key: the place, the same in every Program.
        roles: what it does in the architecture, most specific first; empty where only its name is known.
        layer: index of its layer, None outside the layers.
        stack: path of the layer list it belongs to.
    """

    key: SiteKey
    roles: tuple[str, ...] = ()
    layer: int | None = None
    stack: str = ""
    kind: SiteKind = field(default=SiteKind.VALUE, kw_only=True)

    @property
    def scope(self) -> str:
        """What tells its tensors from those of other sites of its module; empty where nothing has to."""
        return ""


@dataclass(frozen=True)
class Applied:
    """What one adaptation has inserted at a place.

    Attributes:
        adaptation: its name.
        fold: its fold there, from its tensors by part.
        parts: the Store names of these.
    """

    adaptation: str
    fold: Callable[[Mapping[str, Tensor]], Fold]
    parts: Mapping[str, str]


@dataclass(eq=False)
class LinearSite(Site):
    """Rows of a linear map. Orientation, fusion, convolution and bias are hidden: the weight is always the site's own
    rows of ``[out, in]``.

    Attributes:
        use: the map in this Program.
        own: the own rows of the stored weight.
        applied: what has been inserted here so far, in order.
    """

    use: Use = field(kw_only=True)
    own: WeightSlice = field(kw_only=True)
    applied: list[Applied] = field(default_factory=list, kw_only=True)

    @property
    def scope(self) -> str:
        """See `Site.scope`. A module may hold several weights: experts, `nn.MultiheadAttention`."""
        return "" if self.key.name == "weight" else self.key.name

    @property
    def own_bias(self) -> WeightSlice | None:
        """The own entries of the bias; None where there is none."""
        return None if self.use.bias is None else self.use.bias.at(self.own.rows)

    @property
    def slices(self) -> tuple[WeightSlice, ...]:
        """What belongs to it of stored tensors: of the weight, and of the bias where there is one."""
        return (self.own,) if self.own_bias is None else (self.own, self.own_bias)

    @property
    def columns(self) -> WeightSlice:
        """The own rows among those of the use: the own columns of its output."""
        return self.own.within(self.use.weight)

    @property
    def leading(self) -> tuple[int, ...]:
        """Sizes of the axes before ``out`` and ``in``; empty but for experts."""
        return self.use.leading

    @property
    def in_features(self) -> int:
        """Width of the input; for a convolution the entries of a patch, for a table its entries."""
        return self.use.in_features

    @property
    def out_features(self) -> int:
        """Number of the site's own output rows."""
        return self.own.count

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the result."""
        dtype: torch.dtype = self.use.node.meta["val"].dtype
        return dtype


@dataclass(eq=False)
class ExpertsSite(LinearSite):
    """The matrices of all experts, ``[experts, out, in]``: one linear map for each along a leading axis."""

    @property
    def experts(self) -> int:
        """How many."""
        return self.use.leading[0]


@dataclass(eq=False)
class EmbeddingSite(LinearSite):
    """A table of embeddings, as the linear map of one-hot vectors: ``in`` counts its entries, ``out`` its width."""


@dataclass(frozen=True)
class Positions:
    """A call that reads the positions of tokens as whole numbers.

    Attributes:
        reader: the call.
        index: which of its arguments they are; of a look-up in a table, that is the first.
    """

    reader: fx.Node
    index: int

    @property
    def numbers(self) -> fx.Node:
        """The positions."""
        found = self.reader.args[self.index]
        numbers = found[0] if isinstance(found, list | tuple) else found
        assert isinstance(numbers, fx.Node)
        return numbers

    @property
    def table(self) -> fx.Node | None:
        """The table that they are looked up in; None of what computes with them."""
        table = self.reader.args[0] if self.index else None
        return table if isinstance(table, fx.Node) else None

    @property
    def rows(self) -> int | None:
        """How many positions a stored table has."""
        return None if self.table is None or self.table.op != "get_attr" else self.size

    @property
    def size(self) -> int | None:
        """How many positions the table has, stored or not; None without one."""
        if self.table is None:
            return None
        axis: Any = self.reader.args[1] if self.index > 1 else 0
        return int(self.table.meta["val"].shape[axis])


@dataclass(frozen=True)
class AttentionOperands:
    """What an attention is made of.

    Attributes:
        query: the queries, as the call or the product of scores reads them.
        keys, values: ``[rows, heads, keys, width]``: as a fused call reads them; where the attention is written out,
            the nearest above the products that are laid out so.
    """

    query: fx.Node
    keys: fx.Node
    values: fx.Node


@dataclass(eq=False)
class AttentionSite(Site):
    """An attention node.

    Attributes:
        node: the call that gives the heads, before the output projection.
        keys, values: ``int64[heads, width]``: the columns of the projected keys and values that each head has, numbered
            from 0; heads that share keys name the same ones. None where they cannot be followed.
        operands: the values that hold these; None where `keys` is.
        positions: where the positions of what it reads come from; in later layers those of other streams too.
        read: what its sublayer reads, which queries are made of; None where it is in none.
    """

    node: fx.Node = field(kw_only=True)
    keys: Tensor | None = field(default=None, kw_only=True)
    values: Tensor | None = field(default=None, kw_only=True)
    operands: AttentionOperands | None = field(default=None, kw_only=True)
    positions: tuple[Positions, ...] = field(default=(), kw_only=True)
    read: fx.Node | None = field(default=None, kw_only=True)

    @property
    def crosses(self) -> bool:
        """Whether queries and keys are of different streams."""
        return any("cross" in parse_role(role).prefixes for role in self.roles)

    @property
    def scope(self) -> str:
        """See `Site.scope`."""
        return "cross_attn" if self.crosses else "attn"


@dataclass(eq=False)
class NormSite(Site):
    """A normalisation's scale and shift.

    Attributes:
        node: the call that applies the scale.
        weight, bias: Store names; bias is None where there is no shift.
    """

    node: fx.Node = field(kw_only=True)
    weight: str = field(kw_only=True)
    bias: str | None = field(default=None, kw_only=True)


@dataclass(eq=False)
class SublayerSite(Site):
    """A residual branch with its add: an attention, a feed-forward, or both side by side.

    Attributes:
        stream: the residual input.
        normed: what the sublayer reads: the norm's output before it, or the stream itself.
        inner: what the last linear map reads: the heads of an attention, the inner activation of a feed-forward; None
            where the branch ends in more than one map.
        projection: the last linear map's result, before dropout.
        branch: what is added, after dropout, scaling and a norm within the branch.
        sum: the add.
        post_norm: the norm of the sum, where there is one.
        output: what the next sublayer starts from: `post_norm` or `sum`.
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
        """See `Site.scope`: ``attn``, ``cross_attn``, ``ffn``, or ``attn_ffn`` for both in one."""
        names = (parse_role(role) for role in self.roles)
        words = ("_".join((*(p for p in r.prefixes if p == "cross"), r.name.partition(".")[0])) for r in names)
        return "_".join(words)

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the residual stream's branch."""
        dtype: torch.dtype = self.branch.meta["val"].dtype
        return dtype


@dataclass(frozen=True)
class TokenNumbers:
    """The numbers of tokens as a table of embeddings is looked up by them.

    Attributes:
        numbers: ``[batch, sequence]``, whole numbers.
        entries: how many tokens the table has.
    """

    numbers: fx.Node
    entries: int


@dataclass(eq=False)
class ValueSite(Site):
    """An activation by its place: what a layer reads, or what it gives.

    What one layer gives and the next one reads is one value with two sites.

    Attributes:
        node: the value, ``[batch, sequence, width]`` in most models.
        tokens: those that its stack of layers reads; None where it is not made of any.
    """

    node: fx.Node = field(kw_only=True)
    tokens: TokenNumbers | None = field(default=None, kw_only=True)

    @property
    def scope(self) -> str:
        """See `Site.scope`: ``layer_in`` or ``layer_out``."""
        return parse_role(self.roles[0]).name.replace(".", "_")

    @property
    def width(self) -> int:
        """How many entries it has for each token."""
        return int(self.node.meta["val"].shape[-1])

    @property
    def dtype(self) -> torch.dtype:
        """Element type of the value."""
        dtype: torch.dtype = self.node.meta["val"].dtype
        return dtype


@dataclass(eq=False)
class ParameterSite(Site):
    """A base tensor as a whole.

    Attributes:
        tensor: its Store name.
    """

    tensor: str = field(kw_only=True)
