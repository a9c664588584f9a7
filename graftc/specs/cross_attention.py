"""Fine-tuning of cross-attention alone."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target

__all__ = ["CrossAttention"]


class CrossAttention(MethodSpec):
    """Fine-tuning of cross-attention: the projections of every attention from one stack to the other train.

    It is for models of two stacks, to take a translation model to another language; new words have rows of their own
    with `tokens:`. The encoder stays as it is, to the bit. What trains are copies, as with `full`; folding puts the
    trained values in their places.
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
    """Which places of the model it is for; by default the four projections of every cross-attention."""
