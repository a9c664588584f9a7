"""(IA)^3: learned vectors that rescale keys, values and the inner activations of feed-forward parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.peft import AS_USUAL, PeftFormat, PeftList, PeftPart
from graftc.specs.roles import parse_role
from graftc.specs.target import Target

Side = Literal["auto", "output", "input"]
"""The side of a linear map that is scaled."""


class IA3Override(Override):
    """A different side for some of the sites of (IA)^3."""

    side: Side | None = None
    """The side of the map that is scaled at these sites."""


class IA3(MethodSpec):
    """Learned vectors that scale keys, values and inner activations: `l * (W x + b)` or `W (l * x) + b`.

    (IA)^3 stands for infused adapter by inhibiting and amplifying inner activations. Every attention, including
    cross-attention, has a vector for its keys and one for its values, with the size `[out]` of the projection; every
    feed-forward part has one for its inner activations, with the size `[in]` of the projection back to the model's
    width. They are used in the weight's dtype and initialised to ones, so the model is unchanged bit for bit. Each
    folds exactly: into rows of a weight and its bias, or into columns of a weight. Where a model computes the bias of
    keys and values from several tensors, as BEiT of timm does, these vectors stay (GC050).

    By default `target` selects these sites; it may name others. Experts are not adapted: in a model whose feed-forward
    parts are all experts, name the attention roles.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT, bankable=True
    )
    paper: ClassVar[str] = (
        "Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("IA3",),
        parts={"l": PeftPart("ia3_l", "scale")},
        lists={"feedforward_modules": PeftList("side", "output", "input", lambda spec, roles: spec.side_at(roles))},
        starts={"init_ia3_weights": AS_USUAL},
        ignored=frozenset({"init_ia3_weights"}),
        turned=True,
    )

    method: Literal["ia3"] = "ia3"
    """The method's tag."""

    target: Target = Target(role=("attn.k", "attn.v", "ffn.down"))
    """The sites of the model to adapt; by default the keys, values and inner activations of every layer."""

    side: Side = "auto"
    """`output`: scale the map's output, including its bias, by a vector of size `[out]`. `input`: scale its input by a
    vector of size `[in]`, which has a number for each channel of a convolution. `auto`: `input` for sites with the role
    `ffn.down`, `output` for all others."""

    overrides: Items[IA3Override] = ()
    """Other sides for some sites; the first override that matches a site applies."""

    def side_at(self, roles: Sequence[str]) -> Literal["output", "input"]:
        """Return the side that is scaled at a site with these roles, if the spec applies to it."""
        if self.side != "auto":
            return self.side
        return "input" if any(parse_role(role).name == "ffn.down" for role in roles) else "output"
