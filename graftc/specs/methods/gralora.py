"""GraLoRA: a low-rank matrix for each block of a weight, added to that weight."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import PeftFormat, PeftPart
from graftc.specs.spec_errors import refuse


class GraLoRA(MethodSpec):
    """Granular low-rank adaptation: `W + s U` with a low-rank product in each of the `k²` blocks of `U`.

    Rows and columns are split into `k` equal parts each, so a block is `[out/k, in/k]`; its product has rank `rank /
    k`. `A`, `[k, in/k, rank]`, contains for each part of the columns the factors of the `k` blocks in it, and
    `B`, `[k, rank, out/k]`, for each part of the rows those of the blocks in it. The update has up to `k` times
    the rank of LoRA's, with the same number of parameters. `hybrid_rank` adds a LoRA of the whole weight, `A_hybrid`
    and `B_hybrid`, to `U`. The scale is `s = alpha / (rank + hybrid_rank)`.

    All are used in the weight's dtype. `B` and `B_hybrid` are initialised to zeros, so the model is initially
    unchanged; the update folds exactly into `W`. Linear maps are layers, convolutions (`in` counts the entries of a
    patch, and is split) and experts (separate factors for each).
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
        up=frozenset({"B", "B_hybrid"}),
    )
    paper: ClassVar[str] = (
        "Jung et al. 2025, GraLoRA: Granular Low-Rank Adaptation for Parameter-Efficient Fine-Tuning (arXiv:2505.20355)"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("GRALORA",),
        parts={
            "A": PeftPart("gralora_A"),
            "B": PeftPart("gralora_B"),
            "A_hybrid": PeftPart("gralora_A_general.weight"),
            "B_hybrid": PeftPart("gralora_B_general.weight"),
        },
        fields={
            **{"r": "rank", "hybrid_r": "hybrid_rank", "alpha": "alpha", "gralora_k": "k"},
            "gralora_dropout": "dropout",
        },
        fixed={"bias": "none"},
        starts={"init_weights": {True: {"init": "kaiming"}, False: {"init": "random"}}},
        ignored=frozenset({"init_weights"}),
        training=frozenset({"dropout", "init", "excess_rank"}),
        turned=True,
        layers=frozenset({"Linear", "Conv1D"}),
    )

    method: Literal["gralora"] = "gralora"
    """The method's tag."""

    rank: int = Field(default=32, ge=1, le=SIZE)
    """Rank of a row of blocks together, a multiple of `k`; at most min(in, out) of every site."""

    k: int = Field(default=2, ge=1, le=SIZE)
    """Number of parts into which rows and columns are split; must divide `in` and `out` of every site. The paper uses 2
    for ranks up to 32, and 4 from 64 on. 1 is LoRA."""

    hybrid_rank: int = Field(default=0, ge=0, le=SIZE)
    """Rank of the additional update of the whole weight, at most min(in, out) of every site; 0 adds none."""

    excess_rank: bool = False
    """Accept ranks above min(in, out) of a site, which add parameters but no freedom, as checkpoints of PEFT may."""

    alpha: float = Field(default=64.0, gt=0)
    """Numerator of the scaling."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training; both updates read the same dropped input."""

    init: Literal["kaiming", "random"] = "kaiming"
    """`kaiming`: A uniform in ±1/sqrt(in / k), A_hybrid in ±1/sqrt(in), the others zero. `random`: B is also uniform in
    ±1/sqrt(rank), and B_hybrid in ±1/sqrt(hybrid_rank), so the model is another one from the start."""

    @property
    def scaling(self) -> float:
        """The factor of both updates: `alpha / (rank + hybrid_rank)`."""
        return self.alpha / (self.rank + self.hybrid_rank)

    @model_validator(mode="after")
    def _k_divides_the_rank(self) -> Self:
        if self.rank % self.k:
            message = f"rank must be a multiple of k, but {self.rank} is not a multiple of {self.k}"
            refuse("rank", message, hint=f"for example {self.k * max(1, round(self.rank / self.k))}")
        return self
