"""AdapterL: one bottleneck in every layer, after the feed-forward part, with its own layer norm."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import BottleneckSpec, Init, Wiring
from graftc.specs.target import Target


class AdapterL(BottleneckSpec):
    """AdapterL: `y + up(relu(down(LN(y))))` after the feed-forward part of every layer.

    `y` is the output of the layer, after its residual, and the layer norm is the adapter's own. With `init: bert` the
    model initially differs from the base.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )
    mechanism: ClassVar[str | None] = "bottleneck"
    paper: ClassVar[str] = (
        "Lin et al. 2020, Exploring Versatile Generative Language Model Via Parameter-Efficient Transfer Learning"
    )
    wired: ClassVar[Wiring] = Wiring("output", "output", "before")

    method: Literal["adapter_l"] = "adapter_l"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default the feed-forward part of every layer."""

    bottleneck: int | None = Field(default=64, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    init: Init = "bert"
    """How the projections are initialised: `bert`, normal with standard deviation 0.02."""
