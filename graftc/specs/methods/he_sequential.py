"""Sequential adapters: a bottleneck after the feed-forward part or the attention of every layer."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import BottleneckSpec, Init, Wiring
from graftc.specs.target import Target


class HeSequential(BottleneckSpec):
    """Sequential adapters: `g + scale * up(relu(down(g)))` on a sublayer's branch, before the residual is added.

    This is the counterpart of `he_parallel` in the unified view: at the same position as Houlsby adapters, with a
    different initialisation. With `init: lora` the model is initially unchanged.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER}), identity_at_init=True, folds=FoldKind.NONE, bankable=True
    )
    mechanism: ClassVar[str | None] = "bottleneck"
    paper: ClassVar[str] = "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"
    wired: ClassVar[Wiring] = Wiring("branch", "branch")

    method: Literal["he_sequential"] = "he_sequential"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default the feed-forward part of every layer."""

    bottleneck: int | None = Field(default=512, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    init: Init = "lora"
    """How the projections are initialised: `lora`, the first uniform in ±1/sqrt(in), the second zero."""
