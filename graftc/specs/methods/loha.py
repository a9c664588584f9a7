"""LoHa: the elementwise product of two low-rank matrices, added to a weight."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE

__all__ = ["LoHa", "LoHaOverride"]


class LoHaOverride(Override):
    """Other values of LoHa for some of its sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Rank of both products at these sites."""

    alpha: float | None = Field(default=None, gt=0)
    """Numerator of the scaling at these sites."""


class LoHa(MethodSpec):
    """Low-rank Hadamard product: `W + s (B1 A1) * (B2 A2)`, elementwise, with `s = alpha / rank`.

    `A1` and `A2` are `[rank, in]`, `B1` and `B2` are `[out, rank]`, all in the weight's dtype. The product has a rank
    of up to `rank` squared, with the parameters of twice the rank. `A2` is initialised to zeros, so the model is
    initially unchanged; the update folds exactly into `W`.

    Linear maps are layers, convolutions (`in` counts the entries of a patch) and experts (separate factors for each). A
    forward pass materialises the whole update, a matrix of the weight's size, at every site.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}), identity_at_init=True, folds=FoldKind.EXACT
    )
    paper: ClassVar[str] = (
        "Hyeon-Woo et al. 2022, FedPara: Low-Rank Hadamard Product for Communication-Efficient Federated Learning; "
        "Yeh et al. 2024, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation"
    )

    method: Literal["loha"] = "loha"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of both products; at most min(in, out) of every site."""

    alpha: float = Field(default=8.0, gt=0)
    """Numerator of the scaling."""

    overrides: Items[LoHaOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @property
    def scaling(self) -> float:
        """The factor of the update."""
        return self.alpha / self.rank
