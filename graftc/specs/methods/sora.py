"""SoRA: a low-rank update with a gate for every rank, which training drives to zero where possible."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.overrides import RankOverride


class SoRAOverride(RankOverride):
    """Other values of SoRA for some of its sites; omitted fields keep the adaptation's value."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an input of the branch at these sites."""


class SoRA(MethodSpec):
    """Sparse low-rank adaptation: `y = W x + b + s B (g * (A dropout(x)))` with `s = alpha / rank`.

    `A` is `[rank, in]`, the gate `g` is `[rank]` and `B` is `[out, rank]`, used in the weight's dtype. `A` starts
    uniform in ±1/sqrt(in), `g` standard normal and `B` as zeros, so before training the adapted layer computes exactly
    what the base computes. After each optimiser step a proximal operator shrinks the gates and sets small ones to zero;
    ranks whose gate is zero can be removed without any change. When folding, `g` is multiplied into `B`, exactly.

    A training loop calls `compiled.after_step()` after `optimizer.step()`, and `compiled.extra_loss()` for `l1`; the
    Trainer takes `compiled.callback()`. `compiled.rank_pattern(name)` reports which ranks are left. The authors use no
    weight decay for the gates: put parameters whose name ends in `.gate` into a separate group. Adaptive optimisers
    move a gate away from zero again if its gradient exceeds the threshold.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = (
        "Ding et al. 2023, Sparse Low-rank Adaptation of Pre-trained Language Models (arXiv:2311.11696)"
    )

    method: Literal["sora"] = "sora"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank before gates close; at most min(in, out) of every site."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it."""

    dropout_scope: Literal["input", "target"] = "input"
    """Whether sites that read the same input share one dropout mask, or each has its own."""

    threshold: float = Field(default=1e-3, ge=0)
    """Amount by which every gate shrinks after each optimiser step. It is not multiplied by the learning rate. 0 leaves
    the gates unchanged."""

    final_threshold: float | None = Field(default=None, ge=0)
    """Final value of the threshold, reached in equal steps over the whole training run; by default it stays
    constant."""

    prox: Literal["paper", "reference"] = "paper"
    """`paper`: soft threshold, the proximal operator of the L1 norm: values below the threshold become zero.
    `reference`: as in the authors' code, values below twice the threshold become zero. In both, all others shrink by
    the threshold."""

    l1: float = Field(default=0.0, ge=0)
    """Weight of the mean absolute gate, as a term added to the loss; 0 omits it."""

    overrides: Items[SoRAOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @property
    def scaling(self) -> float:
        """The factor of the branch: `alpha / rank`."""
        return self.alpha / self.rank
