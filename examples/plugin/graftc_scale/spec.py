"""The fields that a user writes for ``method: scale``, and the method's claims."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.extend import Claims, FoldKind, MethodSpec, SiteKind


class Scale(MethodSpec):
    """Scale each output of a linear layer: `y = l * (W x + b)` with a trained vector `l`, ones at first.

    The vector has one element per output row of the site, in the weight's dtype, and folds exactly into `W` and `b`.
    """

    claims: ClassVar[Claims] = Claims(sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = (
        "After Liu et al. 2022, Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"
    )

    method: Literal["scale"] = "scale"
    """The method's tag."""
