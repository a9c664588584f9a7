"""Fine-tuning of cross-attention only."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target


class CrossAttention(MethodSpec):
    """Cross-attention fine-tuning: trains the projections of every attention from one stack to the other.

    It is meant for encoder-decoder models, to adapt a translation model to another language; new words get their own
    rows with `tokens:`. The encoder stays unchanged bit for bit. The trained tensors are copies, as with `full`;
    folding writes the trained values in their place.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT, inert=frozenset({"bias"})
    )
    mechanism: ClassVar[str | None] = "full"
    paper: ClassVar[str] = (
        "Gheini et al. 2021, Cross-Attention is All You Need: Adapting Pretrained Transformers for Machine Translation"
    )

    method: Literal["cross_attention"] = "cross_attention"
    """The method's tag."""

    target: Target = Target(role="cross.attn.{q,k,v,o}")
    """The sites of the model to adapt; by default the four projections of every cross-attention."""
