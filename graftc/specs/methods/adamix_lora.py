"""AdaMix for low-rank updates: several copies of LoRA's factors, drawn in each forward pass; deployed as their mean."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.adamix import Consistency, Share


class AdaMixLoRA(MethodSpec):
    """Mixture of low-rank updates: `y = W x + b + s B_j A_i dropout(x)` with `s = alpha / rank`.

    During training, `i` and `j` are drawn uniformly in every forward pass, separately for every site and for both
    factors: q and v of one fused weight are two sites, each with its own draws. Experts are one tensor with a leading
    axis, `A: [experts, rank, in]` and `B: [experts, out, rank]`, used in the weight's dtype. All copies of `A` start
    with the same values, uniform in ±1/sqrt(in), and `B` starts as zeros: before training the adapted layer computes
    exactly what the base computes, and the experts diverge through routing alone.

    In eval mode, in exports and when folding, each factor is the mean of its experts. Since `i` and `j` are
    independent, `mean(B) mean(A)` is the expectation of `B_j A_i`, and it folds exactly. If left unfolded, it is
    deployed as `lora`.

    Training runs the model twice for each batch, to compute the `consistency` of the two passes; see `adamix`, also for
    experts that a pass does not select.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        inert=frozenset({"A"}),  # as long as the copies of B that are drawn are zeros
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = (
        "Wang et al. 2022, AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning (arXiv:2205.12410)"
    )

    method: Literal["adamix_lora"] = "adamix_lora"
    """The method's tag."""

    experts: int = Field(default=8, ge=1, le=64)
    """Number of copies of each factor that is not shared; 8 in the authors' script for GPT-2."""

    share: Share = "up"
    """The factor that all experts share: `up` (`B`, the authors' choice), `down` (`A`), or `none`."""

    rank: int = Field(default=4, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site. 4 in the authors' script for GPT-2."""

    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scaling; 32 in the authors' script for GPT-2."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping an input of the branch during training; 0.1 in the authors' script for GPT-2."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it."""

    dropout_scope: Literal["input", "target"] = "input"
    """Whether sites that read the same input share one dropout mask, or each has its own."""

    consistency: Consistency = Consistency()
    """The loss term that keeps forward passes with different experts consistent."""

    @property
    def scaling(self) -> float:
        """The factor of the branch: `alpha / rank`."""
        return self.alpha / self.rank
