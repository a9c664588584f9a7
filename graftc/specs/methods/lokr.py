"""LoKr: the Kronecker product of two small matrices, added to a weight."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from graftc.specs.limits import SIZE
from graftc.specs.methods.bases.product import PRODUCT_LAYERS, ProductSpec
from graftc.specs.peft import AS_USUAL, NO_DROPOUT, PeftFormat, PeftPart
from graftc.specs.spec_errors import refuse


class LoKr(ProductSpec):
    """Low-rank Kronecker product: `W + s C ⊗ D` with `s = alpha / rank`.

    `out` and `in` are each split into two factors, `out = c1 d1` and `in = c2 d2`; `C` is `[c1, c2]` and `D`, usually
    the larger one, is `[d1, d2]`. `D` is the product of `DB`, `[d1, rank]`, and `DA`, `[rank, d2]`, unless the rank is
    at least half of its larger side; then it is one full matrix. `C` is full, or treated in the same way with
    `decompose_both`. All are used in the weight's dtype. `C` is initialised to zero (if decomposed, `CB` is), so the
    model is initially unchanged; the update folds exactly into `W`.

    Linear maps are layers, convolutions (`in` counts the entries of a patch, and is split) and experts (separate
    factors for each). A forward pass materialises the whole update, a matrix of the weight's size, at every site.
    """

    paper: ClassVar[str] = (
        "Yeh et al. 2024, Navigating Text-To-Image Customization: From LyCORIS Fine-Tuning to Model Evaluation; "
        "KronA: Edalati et al. 2022, KronA: Parameter Efficient Tuning with Kronecker Adapter"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LOKR",),
        parts={
            **{"C": PeftPart("lokr_w1"), "CB": PeftPart("lokr_w1_a"), "CA": PeftPart("lokr_w1_b")},
            **{"D": PeftPart("lokr_w2", "down", axes=(2, 4)), "DB": PeftPart("lokr_w2_a"), "DA": PeftPart("lokr_w2_b")},
        },
        fields={
            **{"r": "rank", "alpha": "alpha", "decompose_both": "decompose_both", "decompose_factor": "factor"},
        },
        patterns={"rank_pattern": "rank", "alpha_pattern": "alpha"},
        fixed={"use_effective_conv2d": False},
        starts={"init_weights": AS_USUAL, "rank_dropout": NO_DROPOUT, "module_dropout": NO_DROPOUT},
        layers=PRODUCT_LAYERS,
        ignored=frozenset({"init_weights", "rank_dropout", "module_dropout", "rank_dropout_scale"}),
    )

    method: Literal["lokr"] = "lokr"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of the decomposed factors, and denominator of the scaling even if nothing is decomposed. A rank of at least
    half the larger side of a factor leaves that factor full."""

    factor: int = Field(default=-1, ge=-1, json_schema_extra={"not": {"const": 0}})
    """The first number of each split, if it divides the side; otherwise the largest divisor that is at most this number
    and at most the square root of the side. -1: the largest divisor that is at most the square root, for the most even
    split."""

    decompose_both: bool = False
    """Decompose `C` as well."""

    @field_validator("factor")
    @classmethod
    def _factor_is_not_zero(cls, value: int) -> int:
        if value == 0:
            refuse((), "factor must be -1 or at least 1, not 0")
        return value
