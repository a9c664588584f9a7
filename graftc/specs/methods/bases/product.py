"""Base of LoHa and LoKr: an update that is a product of small matrices, with a rank and a scaling."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.overrides import RankOverride

PRODUCT_LAYERS: frozenset[str] = frozenset({"Linear", "Conv1d", "Conv2d"})
"""The classes of modules that PEFT adapts with LoHa and LoKr."""


class ProductSpec(MethodSpec):
    """Fields common to LoHa and LoKr."""

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}), identity_at_init=True, folds=FoldKind.EXACT
    )

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of both products; at most min(in, out) of every site."""

    alpha: float = Field(default=8.0, gt=0)
    """Numerator of the scaling."""

    overrides: Items[RankOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @property
    def scaling(self) -> float:
        """The factor of the update: `alpha / rank`."""
        return self.alpha / self.rank
