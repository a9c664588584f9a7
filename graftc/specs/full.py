"""Full fine-tuning: every parameter trains."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target

__all__ = ["TENSORS", "Full"]

TENSORS = frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS, SiteKind.NORM, SiteKind.PARAMETER})
"""The kinds of place that have tensors of the base."""


class Full(MethodSpec):
    """Full fine-tuning: every parameter of the model trains, or every one of the places that a target selects.

    What trains are copies in the base's dtype that stand in for the base's tensors, so the base is never written, other
    adaptations beside it see it as it was, and the model is unchanged to the bit at first. A tensor that is used in
    several places (a head tied to the table of words) has one copy. What no output needs is left out. Folding puts the
    trained values in their places.

    `train:` does the same for modules beside an adaptation; this is an adaptation of its own, with roles and layers.
    """

    claims: ClassVar[Claims] = Claims(sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = (
        "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"
    )

    method: Literal["full"] = "full"
    """The method's tag."""

    target: Target = Target(modules="**")
    """Which places of the model it is for; by default all."""
