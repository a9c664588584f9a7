"""VeRA: random matrices that all sites share, with trained vectors between and after them."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, field_validator

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import AS_USUAL, PeftFormat, PeftPart
from graftc.specs.spec_errors import refuse


class VeRA(MethodSpec):
    """Vector-based random matrix adaptation: `y = W x + c + b * (B (d * (A dropout(x))))` with random, frozen A and B.

    One pair serves the whole adaptation: `A` is `[rank, largest in]` and `B` is `[largest out, rank]`, and a site uses
    their first `in` columns and `out` rows. A site trains `d`, `[rank]`, and `b`, `[out]`, which is initially zero, so
    the model is unchanged. All are used in the weights' dtype. `diag(b) B diag(d) A` folds exactly into `W`.
    """

    claims: ClassVar[Claims] = Claims(sites=frozenset({SiteKind.LINEAR}), identity_at_init=True, folds=FoldKind.EXACT)
    paper: ClassVar[str] = "Kopiczko et al. 2024, VeRA: Vector-based Random Matrix Adaptation"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("VERA",),
        parts={"b": PeftPart("vera_lambda_b"), "d": PeftPart("vera_lambda_d")},
        shared={"A": "vera_A", "B": "vera_B"},
        drawn="save_projection",
        fields={
            **{"r": "rank", "d_initial": "d_initial", "projection_prng_key": "projection_seed"},
            "vera_dropout": "dropout",
        },
        fixed={"bias": "none"},
        starts={"init_weights": AS_USUAL},
        ignored=frozenset({"init_weights"}),
        training=frozenset({"dropout"}),
        written={"projection_prng_key": lambda spec: spec.projection_seed or 0},
        turned=True,
    )

    method: Literal["vera"] = "vera"
    """The method's tag."""

    rank: int = Field(default=256, ge=1, le=SIZE)
    """Rows of A and columns of B. A site trains `rank + out` parameters, so the rank may exceed min(in, out)."""

    d_initial: float = Field(default=0.1, json_schema_extra={"not": {"const": 0}})
    """Initial value of the elements of `d`; must not be 0, with which no gradient would reach `b`."""

    projection_seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed from which only A and B are drawn; they are then identical to PEFT's for this `projection_prng_key`. By
    default they depend on the compilation seed and the name of the adaptation, like all other initial values."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""

    @field_validator("d_initial")
    @classmethod
    def _d_is_not_zero(cls, value: float) -> float:
        if value == 0:
            refuse((), "d_initial must not be 0, since no gradient would reach b", hint="the paper starts at 0.1")
        return value
