"""LoRA: a low-rank matrix added to a linear layer's weight."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, TypeAlias

from pydantic import Field

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.overrides import RankOverride
from graftc.specs.peft import LORA_FIXED, LORA_IGNORED, LORA_STARTS, PeftFormat, PeftPart

OwnInitialiser: TypeAlias = Literal["kaiming", "gaussian", "random", "orthogonal", "pissa", "olora", "loftq"]
"""An initialiser of a single site, as described in `LoRA.init`."""

Initialiser: TypeAlias = Literal[
    "kaiming", "gaussian", "random", "orthogonal", "pissa", "olora", "loftq", "eva", "lora_ga"
]
"""An initialiser, as described in `LoRA.init`."""


class LoRAOverride(RankOverride):
    """Other values of LoRA for some of its sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Rank of the update at these sites."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an input of the branch at these sites."""

    init: OwnInitialiser | None = None
    """Initialiser at these sites. `eva` and `lora_ga` apply to all sites of an adaptation."""


class LoRA(MethodSpec):
    """Low-rank adaptation of linear maps: `y = W x + b + s B A dropout(x)` with `s = alpha / rank`.

    Linear maps are layers, convolutions, embedding tables, and experts (one pair of factors each). `A` is `[rank, in]`
    and `B` is `[out, rank]`, both used in the weight's dtype. `s B A` folds exactly into `W`. Before training the
    adapted layer computes exactly what the base computes, unless `init` is `random` or `loftq`.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = (
        "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models; "
        "rsLoRA: Kalajdzievski 2023, A Rank Stabilization Scaling Factor for Fine-Tuning with LoRA; "
        "LoRA-FA: Zhang et al. 2023, Memory-efficient Low-rank Adaptation for Large Language Models Fine-tuning; "
        "LoftQ: Li et al. 2023, LoftQ: LoRA-Fine-Tuning-Aware Quantization for Large Language Models; "
        "EVA: Paischer et al. 2024, One Initialization to Rule them All; "
        "LoRA-GA: Wang et al. 2024, LoRA-GA: Low-Rank Adaptation with Gradient Approximation"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LORA",),
        parts={
            "A": PeftPart("lora_A.weight", "down", "lora_embedding_A"),
            "B": PeftPart("lora_B.weight", "up", "lora_embedding_B"),
        },
        derived=frozenset({"A0", "B0"}),
        when={"use_dora": False},
        fields={
            **{"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "lora_dropout": "dropout"},
            **{"bias": "bias", "init_lora_weights": "init"},
        },
        values={"init_lora_weights": LORA_STARTS},
        starts={
            "init_lora_weights": {
                True: {"init": "kaiming"},
                False: {"init": "random"},
                **{name: {"init": name} for name in ("gaussian", "orthogonal", "olora", "pissa")},
            }
        },
        unnamed={
            "init_lora_weights": {"loftq": True, "random": False, "orthogonal": "orthogonal"}
            | dict.fromkeys(("eva", "lora_ga"), True)
        },
        patterns={"rank_pattern": "rank", "alpha_pattern": "alpha"},
        constant={"dropout_scope": "target"},
        absent={"alpha": 8.0},
        fixed=LORA_FIXED,
        ignored=LORA_IGNORED,
        document=frozenset({"layer_replication"}),
        training=frozenset(
            {"dropout", "dropout_mask", "dropout_scope", "freeze_a", "excess_rank", "across_groups"}
            | {"loftq_iterations", "eva_rho", "eva_whiten", "lora_ga_gamma"}
        ),
        turned=True,
        parameters=True,
    )

    method: Literal["lora"] = "lora"
    """The method's tag."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site."""

    excess_rank: bool = False
    """Accept a rank above min(in, out) of a site, which adds parameters but no freedom, as checkpoints of PEFT may."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    rslora: bool = False
    """Scale by `alpha / sqrt(rank)`, which keeps the magnitude of updates similar across ranks."""

    across_groups: bool = False
    """In a convolution with groups, which must divide the rank, A reads the channels of all groups, and the rows of
    each group have a share of the ranks, as in PEFT. Such an update does not fold. By default each row's update reads
    what the row reads, and folds."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it (less
    memory, more time)."""

    dropout_scope: Literal["input", "target"] = "input"
    """`input`: the sites of the adaptation that read the same input share one mask, which saves memory. `target`: each
    site has its own mask, as in PEFT."""

    init: Initialiser = "kaiming"
    """`kaiming`: A uniform in ±1/sqrt(in), B zero. `gaussian`: A normal with standard deviation 1/rank, B zero. In an
    embedding table both make A zero and B standard normal. `random`: A uniform in ±1/sqrt(in), B in ±1/sqrt(rank), both
    standard normal in an embedding table: the model is another one from the start. `orthogonal`: A and B random, with
    `B A` zero up to the rounding of float32: the rows of B and the columns of A are in subspaces that are orthogonal to
    each other; the rank is even, and embedding tables start as with `kaiming`. `pissa`: principal singular vectors of
    W. `olora`: its QR factors. These two subtract their initial product, so the model is initially unchanged. `loftq`:
    `s B A` is the part of that rank of what quantising took from W (`base: {quantize: ...}`), so that training starts
    nearer to the model as it was. `eva` and `lora_ga` start from the user's batches, by `compiled.initialise(batches)`:
    `eva` with the principal directions of each site's inputs as A and zero as B, `lora_ga` with the singular directions
    of the weight's gradient, whose initial product is subtracted. Until then both start as `kaiming` does."""

    loftq_iterations: int = Field(default=1, ge=1, le=64)
    """How often `loftq` alternates between quantising a weight and taking the factors from what that loses. With 1, the
    codes are those of the weight. With more, they are those of the weight less the factors of the last iteration but
    one: the adaptation chooses the codes of the base, which others read as well."""

    eva_rho: float = Field(default=2.0, ge=1)
    """The largest rank of a site, over `rank`, when `eva` distributes ranks by explained variance. All ranks add up to
    the same number as without it, and each is at least 1. With 1 every site keeps its rank."""

    eva_whiten: bool = False
    """Whether `eva` divides each direction by the fourth root of its variance."""

    lora_ga_gamma: float = Field(default=16.0, ge=1e-6, le=1e12)
    """Scale of `lora_ga`: both factors are multiplied by `out^(1/4) / sqrt(gamma)`."""

    freeze_a: bool = False
    """LoRA-FA: A keeps its initial values and B alone trains, so that the inputs of the sites need not be kept for the
    backward pass. In an embedding table A then starts standard normal and B zero."""

    bias: Literal["none", "lora_only", "all"] = "none"
    """The biases that train as well: none, those of the adapted layers, or all biases of the model."""

    overrides: Items[LoRAOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @property
    def scaling(self) -> float:
        """The factor of the branch: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
