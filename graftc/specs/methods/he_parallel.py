"""Parallel adapters: a bottleneck beside the feed-forward part or the attention of every layer."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import BottleneckSpec, Init, Wiring
from graftc.specs.target import Target


class HeParallel(BottleneckSpec):
    """Parallel adapters: `g + scale * up(relu(down(x)))`, where `x` is the input of the sublayer.

    `x` is the residual stream, before the norm in pre-norm models, and `g` is the branch before it is added. On an
    attention (`target: {role: attn.sublayer}`) the result is added to its heads, before the output projection. With
    `init: lora` the model is initially unchanged.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER}), identity_at_init=True, folds=FoldKind.NONE, bankable=True
    )
    mechanism: ClassVar[str | None] = "bottleneck"
    paper: ClassVar[str] = "He et al. 2022, Towards a Unified View of Parameter-Efficient Transfer Learning"

    method: Literal["he_parallel"] = "he_parallel"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default the feed-forward part of every layer."""

    bottleneck: int | None = Field(default=512, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    init: Init = "lora"
    """How the projections are initialised: `lora`, the first uniform in ±1/sqrt(in), the second zero."""

    scale: float | Literal["learned"] = 4.0
    """Factor applied to the result: 4 for summarisation and translation, 2 for GLUE in the paper; `learned`: a
    trainable scalar, initialised to 1."""

    def wiring(self, kind: SiteKind, roles: Collection[str]) -> Wiring:
        """Return a wiring that reads the residual stream and adds to the branch, or to the heads of an attention."""
        attention = any(role.endswith("attn.sublayer") for role in roles)
        return Wiring("stream", "inner" if attention else "branch")
