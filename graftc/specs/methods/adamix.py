"""AdaMix: several copies of an adapter, one of which is drawn for each forward pass; deployed as their mean."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import SpecModel
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import Activation, BottleneckSpec, Init, Wiring
from graftc.specs.target import Target

Share = Literal["up", "down", "none"]
"""The projection, if any, that all experts share."""


class Consistency(SpecModel):
    """A loss term that keeps two forward passes with different experts and dropout masks consistent.

    It is `weight / 2 (KL(p1 || p2) + KL(p2 || p1))` for the softmax of the logits of both, summed over classes and
    averaged over the batch, and over positions if there are any; with labels for each position, positions labelled -100
    do not count. In a causal language model the position that predicts a label counts, not the position of the label
    itself. A single logit contributes no difference. The loss itself is that of the first pass.
    """

    weight: float = Field(default=1.0, ge=0)
    """Factor of the term; 0 omits the second pass. The authors' script for GPT-2 uses 100."""

    detach: bool = True
    """Treat the target of each divergence as a constant, as the authors' code does: the value is the same, and the
    gradient flows through the other side only. `false` uses the gradient of the term itself."""


class AdaMix(BottleneckSpec):
    """Mixture of adapters: `g + up_j(gelu(down_i(g)))` after the last map of every feed-forward part.

    It is placed before the dropout and the residual of that part.

    During training, `i` and `j` are drawn uniformly in every forward pass, separately for every layer and for both
    projections, and once for the whole batch: all rows use the same experts. Experts are one tensor with a leading
    axis, as in `down: [experts, bottleneck, width]`. In eval mode and in exports the weights are the mean of all
    experts; `compiled.merge_partially()` leaves one adapter, the method `bottleneck` with that mean. Its function is
    not the expectation of the routed one, because there is an activation in between: the certificate states the
    distance between them.

    Training runs the model twice for each batch, to compute the `consistency` of the two passes. If the model returns a
    loss, the term is part of it, so nothing else has to be done, including with the Trainer and with gradient
    accumulation. If the loss is computed outside the model, add `compiled.extra_loss()` to it before the backward pass.
    Other layers that train at the same time, such as batch normalisation, see both passes.

    Experts that a pass does not select have zero gradient; AdamW moves them nevertheless, through its momentum and
    weight decay. With `init: bert` the model initially differs from the base, and the experts start with different
    values.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER}),
        identity_at_init=False,
        folds=FoldKind.NONE,
        undecayed=frozenset({"*_bias"}),
    )
    paper: ClassVar[str] = (
        "Wang et al. 2022, AdaMix: Mixture-of-Adaptations for Parameter-efficient Model Tuning (arXiv:2205.12410)"
    )
    wired: ClassVar[Wiring] = Wiring("projection", "projection")

    method: Literal["adamix"] = "adamix"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default the feed-forward part of every layer."""

    experts: int = Field(default=4, ge=1, le=64)
    """Number of copies of each projection that is not shared. The authors use 4 for BERT and RoBERTa, 8 for GPT-2."""

    share: Share = "up"
    """The projection that all experts share: `up` (the authors' choice), `down`, or `none`."""

    bottleneck: int | None = Field(default=16, ge=1, le=SIZE)
    """Width of the bottleneck; give this or `reduction`. The authors use 16 for RoBERTa-large, 48 for BERT-base and 8
    for GPT-2 medium."""

    activation: Activation = "gelu"
    """The activation function between the two projections."""

    init: Init = "bert"
    """How the projections are initialised: `bert`, normal with standard deviation 0.02, independently for each
    expert."""

    consistency: Consistency = Consistency()
    """The loss term that keeps forward passes with different experts consistent."""
