"""AdaMix: several copies of an adapter, one of which is drawn for each forward pass; deployed as their mean."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import SpecModel
from graftc.specs.bottleneck import Activation, BottleneckSpec, Init, Wiring
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.target import Target

__all__ = ["AdaMix", "Consistency", "Share"]

Share = Literal["up", "down", "none"]
"""Which of the two projections all experts have in common."""


class Consistency(SpecModel):
    """A term beside the loss that keeps two forward passes with other experts and dropout masks alike.

    It is `weight / 2 (KL(p1 || p2) + KL(p2 || p1))` for the softmax of the logits of both, summed over classes and
    averaged over the batch, and over positions where there are any; with labels for each position those of -100 do not
    count. In a causal language model the position that predicts a label counts, not the one where the label stands.
    A single logit has nothing to differ in. The loss itself is that of the first pass.
    """

    weight: float = Field(default=1.0, ge=0)
    """Factor of the term; 0 leaves the second pass out. The authors' script for GPT-2 has 100."""

    detach: bool = True
    """Take the target of each divergence as a constant, as the authors' code does: the value is the same, and the
    gradient is that of the other side only. `false` is the gradient of the term itself."""


class AdaMix(BottleneckSpec):
    """Mixture of adapters: `g + up_j(gelu(down_i(g)))` behind the last map of every feed-forward part.

    It stands before the dropout and the residual of that part.

    `i` and `j` are drawn uniformly in every forward pass while training, for every layer and for both projections
    separately, outside the batch: all its rows have the same. Experts are one tensor with a leading axis, as
    `down: [experts, bottleneck, width]`. In eval mode and in exports the weights are the mean of all experts;
    `compiled.merge_partially()` leaves one adapter, the method `bottleneck` with that mean. Its function is not the
    expectation of the routed one, since there is an activation between: the certificate says how far they are apart.

    Training runs the model twice for each batch, for the `consistency` of both. Where the model gives a loss it is part
    of it, so that nothing else has to be done, with the Trainer and with gradient accumulation. Where the loss is
    computed outside, add `compiled.extra_loss()` to it before its backward pass. Layers that train beside it,
    batch normalisation for one, see both passes.

    Experts that a pass does not pick have zero gradient; AdamW moves them all the same, by its momentum and its weight
    decay. With `init: bert` the model is not the base's at first, and experts start different.
    """

    claims: ClassVar[Claims] = Claims(sites=frozenset({SiteKind.SUBLAYER}), identity_at_init=False, folds=FoldKind.NONE)
    paper: ClassVar[str] = (
        "Wang et al. 2022, AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning (arXiv:2205.12410)"
    )

    method: Literal["adamix"] = "adamix"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """Which places of the model it is for; by default the feed-forward part of every layer."""

    experts: int = Field(default=4, ge=1, le=64)
    """How many copies there are of each projection that is not shared. The authors have 4 for BERT and RoBERTa, 8 for
    GPT-2."""

    share: Share = "up"
    """Which projection all experts have in common: `up` (the authors' choice), `down`, or `none`."""

    bottleneck: int | None = Field(default=16, ge=1, le=SIZE)
    """Width of the bottleneck; give this or `reduction`. The authors have 16 for RoBERTa-large, 48 for BERT-base and 8
    for GPT-2 medium."""

    activation: Activation = "gelu"
    """The function between the two projections."""

    init: Init = "bert"
    """How the projections start: `bert`, normal with deviation 0.02, every expert for itself."""

    consistency: Consistency = Consistency()
    """The term beside the loss that keeps forward passes with other experts alike."""

    def wiring(self, kind: SiteKind, roles: Collection[str]) -> Wiring:
        """See `BottleneckSpec.wiring`."""
        return Wiring("projection", "projection")
