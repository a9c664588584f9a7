"""AdaMix of low-rank updates: several copies of LoRA's factors, drawn for each forward pass; deployed as their mean."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.adamix import Consistency, Share
from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE

__all__ = ["AdaMixLoRA"]


class AdaMixLoRA(MethodSpec):
    """Mixture of low-rank updates: `y = W x + b + s B_j A_i dropout(x)` with `s = alpha / rank`.

    `i` and `j` are drawn uniformly in every forward pass while training, for every place and for both factors
    separately: q and v of one fused weight are two places, each with draws of its own. Experts are one tensor with a
    leading axis, `A: [experts, rank, in]` and `B: [experts, out, rank]`, in the weight's dtype. All copies of `A` start
    alike, uniform in ±1/sqrt(in), and `B` as zeros: before training the adapted layer computes exactly what the base
    computes, and experts part through routing alone.

    In eval mode, in exports and when folding, factors are the mean of their experts. Since `i` and `j` are independent,
    `mean(B) mean(A)` is the expectation of `B_j A_i`, and it folds exactly. What stays unfolded is deployed as `lora`.

    Training runs the model twice for each batch, for the `consistency` of both; see `adamix`, also for experts that a
    pass does not pick.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        inert=frozenset({"A"}),  # while the copies of B that are drawn are zeros
    )
    paper: ClassVar[str] = (
        "Wang et al. 2022, AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning (arXiv:2205.12410)"
    )

    method: Literal["adamix_lora"] = "adamix_lora"
    """The method's tag."""

    experts: int = Field(default=8, ge=1, le=64)
    """How many copies there are of each factor that is not shared; 8 in the authors' script for GPT-2."""

    share: Share = "up"
    """Which factor all experts have in common: `up` (`B`, the authors' choice), `down` (`A`), or `none`."""

    rank: int = Field(default=4, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site. 4 in the authors' script for GPT-2."""

    alpha: float = Field(default=32.0, gt=0)
    """Numerator of the scaling; 32 in the authors' script for GPT-2."""

    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Probability of dropping an input of the branch while training; 0.1 in the authors' script for GPT-2."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """What the backward pass has of the dropout mask: the mask itself, or a seed to make it anew from."""

    dropout_scope: Literal["input", "target"] = "input"
    """Whether sites that read the same input share one dropout mask, or each has its own."""

    consistency: Consistency = Consistency()
    """The term beside the loss that keeps forward passes with other experts alike."""

    @property
    def scaling(self) -> float:
        """The factor of the branch: `alpha / rank`."""
        return self.alpha / self.rank
