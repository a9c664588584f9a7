"""DoRA: a weight decomposed into magnitudes and directions, with a low-rank update of the directions."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.overrides import RankOverride
from graftc.specs.peft import LORA_FIXED, LORA_IGNORED, LORA_STARTS, PeftFormat, PeftPart

_FROM_WEIGHT = ("pissa", "olora")
"""Initialisers of LoRA that DoRA does not support."""


class DoRAOverride(RankOverride):
    """Other values of DoRA for some of its sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Rank of the update at these sites."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an input at these sites."""

    init: Literal["kaiming", "gaussian"] | None = None
    """Initialiser at these sites."""

    direction: bool | None = None
    """Whether these sites have factors in addition to their magnitudes."""


class DoRA(MethodSpec):
    """Weight-decomposed low-rank adaptation: `y = W' x + b` with `W' = m * V / |V|` and `V = W + s B A`.

    `|V|` denotes the norms of the rows of `V`, one for each output feature, and `m` the trained magnitudes, `[out]`,
    initialised to the norms of the rows of `W`; `A` is `[rank, in]`, `B` is `[out, rank]`, and `s = alpha / rank`. The
    paper writes norms of columns, of the transposed weight. The bias is not scaled. Each expert has its own magnitudes
    and factors, a convolution has one magnitude for each output channel, and an embedding table has one for each
    element of a row.

    Magnitudes and norms are stored and computed in float32, or in float64 for a float64 base, and neither `V` nor `B A`
    is ever materialised. Before training the adapted layer computes exactly what the base computes, and `W'` folds
    exactly.

    On top of other adaptations of a site, `W` is the effective weight after them. They must fold.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = "Liu et al. 2024, DoRA: Weight-Decomposed Low-Rank Adaptation (arXiv:2402.09353)"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LORA",),
        parts={
            "A": PeftPart("lora_A.weight", "down", "lora_embedding_A"),
            "B": PeftPart("lora_B.weight", "up", "lora_embedding_B"),
            "m": PeftPart("lora_magnitude_vector", "vector"),
        },
        when={"use_dora": True},
        fields={
            **{"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "lora_dropout": "dropout"},
            "init_lora_weights": "init",
        },
        values={"init_lora_weights": {key: word for key, word in LORA_STARTS.items() if word not in _FROM_WEIGHT}},
        starts={"init_lora_weights": {True: {"init": "kaiming"}, "gaussian": {"init": "gaussian"}}},
        patterns={"rank_pattern": "rank", "alpha_pattern": "alpha"},
        constant={"dropout_scope": "target"},
        absent={"alpha": 8.0},
        fixed={**LORA_FIXED, "bias": "none"},
        ignored=LORA_IGNORED,
        document=frozenset({"layer_replication"}),
        training=frozenset(
            {"dropout", "dropout_mask", "dropout_scope", "dropout_on", "init", "norm_gradient", "excess_rank"}
        ),
        turned=True,
    )

    method: Literal["dora"] = "dora"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site."""

    excess_rank: bool = False
    """Accept a rank above min(in, out) of a site, which adds parameters but no freedom, as checkpoints of PEFT may."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    rslora: bool = False
    """Scale by `alpha / sqrt(rank)`, which keeps the magnitude of updates similar across ranks."""

    direction: bool = True
    """Whether there are factors `A` and `B`. False trains magnitudes only; usually set for some sites with
    `overrides`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input during training. Sites without factors have no dropout."""

    dropout_on: Literal["input", "branch"] = "input"
    """Where the dropped input `x~` is used. `input`: in everything that the adaptation adds, `y = W x + (c - 1) W x~ +
    c s B A x~ + b` with `c = m / |V|`, as in the authors' code and in peft; this costs a second product with `W`.
    `branch`: in the factors only, `y = c (W x + s B A x~) + b`, which is cheaper."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it (less
    memory, more time)."""

    dropout_scope: Literal["input", "target"] = "input"
    """`input`: the sites of the adaptation that read the same input share one mask, which saves memory. `target`: each
    site has its own mask, as in peft."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """`kaiming`: A uniform in ±1/sqrt(in), B zero. `gaussian`: A normal with standard deviation 1/rank, B zero. In an
    embedding table both make A zero and B standard normal."""

    norm_gradient: Literal["detached", "exact"] = "detached"
    """`detached`: the norms are constants in the backward pass, which the paper recommends and all code does. `exact`:
    the gradient flows through them, which makes it orthogonal to each row of V."""

    overrides: Items[DoRAOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @property
    def scaling(self) -> float:
        """The factor of the update: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
