"""SHiRA: sparse updates at random positions, as many entries as a low-rank update would have parameters."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bases.sparse import BudgetSpec
from graftc.specs.peft import AS_USUAL, PeftFormat, PeftPart


class SHiRA(BudgetSpec):
    """Sparse high rank adapters: `W' = W + S`, where `S` has `rank (in + out)` trained entries at random positions.

    Every weight has as many entries as a low-rank update of this rank has parameters, but `S` is not limited to that
    rank. The trained parameters are the differences from the base, initially zero, so the model is initially unchanged;
    they are saved with the indices of their entries, and no mask exists. A product with such a weight stores neither a
    second weight nor, if few entries train, the weight's gradient: see the page on sparse fine-tuning. `S` folds
    exactly into `W`.

    Each expert of a layer has `rank (in + out)` entries on average, and a fused weight counts as one unless the target
    selects rows of it. A head that produces the outputs is skipped.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
    )
    paper: ClassVar[str] = "Bhardwaj et al. 2024, Sparse High Rank Adapters (arXiv:2406.13175)"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("SHIRA",),
        layers=frozenset({"Linear"}),
        parts={
            "weight_delta": PeftPart("shira_weight"),
            "weight_indices": PeftPart("shira_indices", "places"),
        },
        fields={"r": "rank", "random_seed": "mask_seed"},
        starts={"init_weights": AS_USUAL, "mask_type": {"random": {}}},
        ignored=frozenset({"init_weights", "mask_type", "fan_in_fan_out"}),
        training=frozenset({"mask_seed"}),
        probe={"mask_fn": None},
    )

    method: Literal["shira"] = "shira"
    """The method's tag."""

    rank: int = Field(default=32, ge=1, le=SIZE)
    """Determines the number of entries of each weight: `rank (in + out)`, which must not exceed `in out`."""

    mask_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed from which only the positions are drawn, the same ones in all weights of one size; they are then identical
    to PEFT's for this `random_seed`. By default they depend on the compilation seed and on the names of the adaptation
    and the weight, like all other initial values."""

    @property
    def budget_field(self) -> str:
        """The name of the field that sets the budget."""
        return "rank"
