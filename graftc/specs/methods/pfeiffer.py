"""Pfeiffer adapters: one bottleneck in every layer, after the feed-forward part and its norm."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.methods.bottleneck import BottleneckSpec, Init, Wiring
from graftc.specs.target import Target


class Pfeiffer(BottleneckSpec):
    """Pfeiffer adapters: one bottleneck in every layer, which reads after the norm and adds before it.

    With the branch `g` and the residual stream `h`, the adapter reads `u = LN(g + h)`, adds to the branch itself, and
    the model's norm is applied once more: `y = LN(g + A(u) + h)`. In pre-norm models there is no norm to repeat: `u = g
    + h` and `y = g + A(u) + h`. These are the adapters of AdapterFusion and MAD-X. With `init: bert` the model
    initially differs from the base.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    mechanism: ClassVar[str | None] = "bottleneck"
    paper: ClassVar[str] = (
        "Pfeiffer et al. 2021, AdapterFusion: Non-Destructive Task Composition for Transfer Learning; "
        "Pfeiffer et al. 2020, MAD-X: An Adapter-Based Framework for Multi-Task Cross-Lingual Transfer"
    )
    wired: ClassVar[Wiring] = Wiring("output", "branch")

    method: Literal["pfeiffer"] = "pfeiffer"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default the feed-forward part of every layer."""

    reduction: float | None = Field(default=16.0, gt=0)
    """Input width divided by bottleneck width, rounded down: 16 turns 768 into 48."""

    init: Init = "bert"
    """How the projections are initialised: `bert`, normal with standard deviation 0.02."""
