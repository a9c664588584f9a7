"""BitFit: biases train, and nothing else."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target

__all__ = ["BitFit"]


class BitFit(MethodSpec):
    """BitFit: the biases of linear maps and norms train, the weights stay.

    A head that gives the outputs is left out: name it in `train:`. Biases of keys change nothing, since the softmax
    does not see them, unless a prefix stands in front. What trains are copies that stand in for the base's tensors;
    folding puts the trained values in their places.

    A model without biases has nothing to train, which is an error; with `add_missing` maps without one get one of
    zeros.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.NORM, SiteKind.PARAMETER}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        inert=frozenset({"bias"}),
    )
    paper: ClassVar[str] = (
        "Ben-Zaken et al. 2022, BitFit: Simple Parameter-efficient Fine-tuning for Transformer-based Masked "
        "Language-models"
    )

    method: Literal["bitfit"] = "bitfit"
    """The method's tag."""

    target: Target = Target(modules="**")
    """Which places of the model it is for; by default every map and norm."""

    add_missing: bool = False
    """Give linear maps without a bias one that starts at zeros."""
