"""MiSS: one small matrix, repeated along a weight's columns, as the update of the weight."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.overrides import Override
from graftc.specs.peft import PeftFormat, PeftPart


class MiSSOverride(Override):
    """Other sizes for some sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Width of a shard at these sites."""

    mini_rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Columns of `D` at these sites, with `variant: mini`."""


class MiSS(MethodSpec):
    """Matrix shard sharing: `y = W x + b + D' s`, where `s` is the sum of the input's shards of width `rank`.

    The columns of `W` are divided into shards of `rank` columns, the last of which may be narrower, and the transpose
    of one trained matrix `D` is added to each of them. The branch therefore needs no product with the whole input: it
    adds up the shards and multiplies the sum, of width `rank`, by `D`. `D` is initialised to zeros, so the model is
    initially unchanged, and is used in the weight's dtype. The update folds exactly into `W`.

    Linear maps are layers, convolutions (`in` counts the entries of a patch) and experts (a separate `D` for each).
    With `variant: bat` at every site, and with any variant at convolutions, a forward pass materialises the whole
    update, a matrix of the weight's size.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}), identity_at_init=True, folds=FoldKind.EXACT, bankable=True
    )
    paper: ClassVar[str] = (
        "Kang and Yin 2024, MiSS: Revisiting the Trade-off in LoRA with an Efficient Shard-Sharing Structure "
        "(arXiv:2409.15371)"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("MISS",),
        layers=frozenset({"Linear"}),
        parts={"D": PeftPart("miss_block")},
        fields={"r": "rank", "mini_r": "mini_rank", "miss_dropout": "dropout", "init_weights": "variant"},
        values={"init_weights": {True: "balance", False: "balance", "bat": "bat", "mini": "mini"}},
        starts={
            "init_weights": {True: {"variant": "balance"}, **{word: {"variant": word} for word in ("bat", "mini")}}
        },
        fixed={"bias": "none"},
        training=frozenset({"dropout"}),
    )

    method: Literal["miss"] = "miss"
    """The method's tag."""

    variant: Literal["balance", "bat", "mini"] = "balance"
    """`balance`: `D` is `[rank, out]`. `mini`: `D` is `[rank, mini_rank]` and is repeated along the outputs as well.
    `bat`: the rows of `W` are divided into blocks of `rank` too, block `i` of the rows has its own `D_i`,
    `[rank, rank]`, and the update of each square block `W_ij` depends on the block: `W_ij D_i + D_i`. On top of other
    adaptations, `W` is the effective weight after them; they must fold."""

    rank: int = Field(default=64, ge=1, le=SIZE)
    """Width of a shard; at most `in` of every site. With `variant: bat` it must divide `in` and `out`."""

    mini_rank: int = Field(default=1, ge=1, le=SIZE)
    """Columns of `D` with `variant: mini`; must divide `out` of every site. Other variants do not read it."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training. PEFT's `bat` has no dropout, whatever its config
    contains."""

    overrides: Items[MiSSOverride] = ()
    """Other sizes for some sites; the first override that matches a site applies."""
