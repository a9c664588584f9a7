"""Full fine-tuning: training of every parameter."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target

TENSORS = frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS, SiteKind.NORM, SiteKind.PARAMETER})
"""The kinds of site that have base tensors."""


class Full(MethodSpec):
    """Full fine-tuning: trains every parameter of the model, or every parameter of the sites that a target selects.

    The trained tensors are copies, used in the base's dtype, that stand in for the base's tensors, so the base is never
    written, other adaptations alongside see it unchanged, and the model is initially unchanged bit for bit. A tensor
    that is used in several places (a head tied to the embedding table) has one copy. Parameters that no output depends
    on are left out. Folding writes the trained values in their place.

    `train:` does the same for modules alongside an adaptation; this is an adaptation of its own, with roles and layers.
    """

    claims: ClassVar[Claims] = Claims(sites=TENSORS, identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = (
        "Devlin et al. 2019, BERT: Pre-training of Deep Bidirectional Transformers for Language Understanding"
    )

    method: Literal["full"] = "full"
    """The method's tag."""

    target: Target = Target(modules="**")
    """The sites of the model to adapt; by default all."""
