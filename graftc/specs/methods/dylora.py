"""DyLoRA: one low-rank update that is trained for every rank up to its own."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE


class DyLoRA(MethodSpec):
    """Low-rank adaptation for many ranks: `y = W x + b + (alpha / r) B[:, :r] A[:r] dropout(x)`.

    `A` is `[rank, in]`, initially uniform in ±1/sqrt(in), and `B` is `[out, rank]`, initially zeros, both used in the
    weight's dtype, so before training the adapted layer computes exactly what the base computes. Every forward pass in
    training draws one `r`, the same for all sites, uniformly from 1 to `rank`. With gradient accumulation every
    micro-batch draws its own (the authors draw once per optimiser step).

    In eval mode, in exports and when folding, `r` is the deployed rank, which is `rank` until
    `compiled.deploy_rank(name, r)` sets it; it is saved with the tensors. The update for a rank is part of the update
    for every higher rank, and folds exactly.

    Rows that the pass does not train have zero gradient. AdamW moves them nevertheless, through its momentum and weight
    decay: that only one row changes holds for gradients, and for plain SGD.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        inert=frozenset({"A"}),
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = (
        "Valipour et al. 2023, DyLoRA: Parameter-Efficient Tuning of Pre-trained Models using Dynamic Search-Free "
        "Low-Rank Adaptation (arXiv:2210.07558)"
    )

    method: Literal["dylora"] = "dylora"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """The largest rank; at most min(in, out) of every site."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    frozen: bool = True
    """Train only row `r` of `A` and column `r` of `B` in a pass with rank `r`, as the authors' scripts do; the earlier
    ones take part without a gradient. False trains all of the first `r`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it."""

    dropout_scope: Literal["input", "target"] = "input"
    """Whether sites that read the same input share one dropout mask, or each has its own."""
