"""(IA)^3: learned vectors that rescale keys, values and the inner activations of feed-forward parts."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target

__all__ = ["IA3", "IA3Override", "Side"]

Side = Literal["auto", "output", "input"]
"""Which end of a linear map is scaled."""


class IA3Override(Override):
    """Another side for some of the sites of (IA)^3."""

    side: Side | None = None
    """Which end of the map is scaled at these sites."""


class IA3(MethodSpec):
    """Learned vectors that scale keys, values and inner activations: `l * (W x + b)` or `W (l * x) + b`.

    (IA)^3 stands for infused adapter by inhibiting and amplifying inner activations.
    Every attention has a vector for its keys and one for its values, `[out]` of the projection, cross-attentions
    included; every feed-forward part has one for its inner activations, `[in]` of the projection back to the model's
    width. They are in the weight's dtype and start as ones, so that the model is unchanged to the bit. Each folds
    exactly: into rows of a weight and its bias, or into columns of a weight.

    `target` has these places as its default and may name others. Experts are not adapted: in a model whose feed-forward
    parts are all experts, name the roles of the attentions.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT, bankable=True
    )
    paper: ClassVar[str] = (
        "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    )

    method: Literal["ia3"] = "ia3"
    """The method's tag."""

    target: Target = Target(role=("attn.k", "attn.v", "ffn.down"))
    """Which places of the model it is for; by default keys, values and inner activations of every layer."""

    side: Side = "auto"
    """`output`: scale what the map gives, its bias included, by a vector of `[out]`. `input`: scale what it reads, by
    one of `[in]`; not possible for convolutions over more than a point. `auto`: `input` for sites of the role
    `ffn.down`, `output` for all others."""

    overrides: Items[IA3Override] = ()
    """Other sides for some sites; the first that matches a site holds."""
