"""DoRA: a weight taken apart into magnitudes and directions, with a low-rank update of the directions."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE

__all__ = ["DoRA", "DoRAOverride"]


class DoRAOverride(Override):
    """Other values of DoRA for some of its sites; what is left out keeps the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Rank of the update at these sites."""

    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scaling at these sites."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an input at these sites."""

    init: Literal["kaiming", "gaussian"] | None = None
    """Initialiser at these sites."""

    direction: bool | None = None
    """Whether these sites have factors beside their magnitudes."""


class DoRA(MethodSpec):
    """Weight-decomposed low-rank adaptation: `y = W' x + b` with `W' = m * V / |V|` and `V = W + s B A`.

    `|V|` are the norms of the rows of `V`, one for each output feature, and `m` are trained magnitudes, `[out]`, which
    start as the norms of the rows of `W`; `A` is `[rank, in]`, `B` is `[out, rank]`, and `s = alpha / rank`. The paper
    writes norms of columns, of the transposed weight. The bias is not scaled. Experts have magnitudes and factors of
    their own, a convolution one magnitude for each output channel, a table of embeddings one for each element of a row.

    Magnitudes and norms are kept and worked out in float32, in float64 for a float64 base, and neither `V` nor `B A` is
    ever made. Before training the adapted layer computes exactly what the base computes, and `W'` folds exactly.

    On top of other adaptations of a site, `W` is the weight as they leave it. They have to fold.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
    )
    paper: ClassVar[str] = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353)"

    method: Literal["dora"] = "dora"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    rslora: bool = False
    """Scale by `alpha / sqrt(rank)`, which keeps the size of updates alike over ranks."""

    direction: bool = True
    """Whether there are factors `A` and `B`. False trains magnitudes only; mostly set for some sites by `overrides`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input while training. Sites without factors have none."""

    dropout_on: Literal["input", "branch"] = "input"
    """What sees the dropped input. `input`: all that the adaptation adds, `y = W x + (c - 1) W x~ + c s B A x~ + b`
    with `c = m / |V|`, as in the authors' code and in peft; it costs a second product with `W`. `branch`: the factors
    only, `y = c (W x + s B A x~) + b`, which is cheaper."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """What the backward pass has of the dropout mask: the mask itself, or a seed to make it anew from (less
    memory, more time)."""

    dropout_scope: Literal["input", "target"] = "input"
    """`input`: the sites of the adaptation that read the same input share one mask, which saves memory. `target`: each
    site has a mask of its own, as in peft."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """`kaiming`: A uniform in ±1/sqrt(in), B zero. `gaussian`: A normal with deviation 1/rank, B zero. In a table of
    embeddings both make A zero and B standard normal."""

    norm_gradient: Literal["detached", "exact"] = "detached"
    """`detached`: the norms are constants for the backward pass, which the paper recommends and all code does. `exact`:
    the gradient goes through them, which makes it orthogonal to each row of V."""

    overrides: Items[DoRAOverride] = ()
    """Other values for some sites; the first that matches a site holds."""

    @property
    def scaling(self) -> float:
        """The factor of the update: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
