"""BitFit: training of biases only."""

from __future__ import annotations

from typing import ClassVar, Literal

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.target import Target


class BitFit(MethodSpec):
    """BitFit: trains the biases of linear maps and norms; the weights stay unchanged.

    A head that produces the outputs is left out: name it in `train:`. Biases of keys have no effect, because the
    softmax is invariant to them, unless there is a prefix. The trained tensors are copies that stand in for the base's
    tensors; folding writes the trained values in their place.

    A model without biases has nothing to train, which is an error; with `add_missing`, linear maps without a bias get
    one, initialised to zeros.
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
    """The sites of the model to adapt; by default every linear map and norm."""

    add_missing: bool = False
    """Add a bias, initialised to zeros, to linear maps without one."""
