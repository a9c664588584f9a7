"""HiRA: the elementwise product of a weight and a low-rank matrix, added to that weight."""

from __future__ import annotations

from typing import ClassVar, Literal, TypeAlias

from pydantic import Field

from graftc.specs.base import Items, MethodSpec, Override
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import PeftFormat, PeftPart

Start: TypeAlias = Literal["kaiming", "gaussian", "random"]
"""An initialiser, as described in `HiRA.init`."""


class HiRAOverride(Override):
    """Other values of HiRA for some of its sites; omitted fields keep the adaptation's value."""

    rank: int | None = Field(default=None, ge=1, le=SIZE)
    """Rank of the factors at these sites."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an input of the branch at these sites."""

    init: Start | None = None
    """Initialiser at these sites."""


class HiRA(MethodSpec):
    """Hadamard high-rank adaptation: `y = W x + b + (W * (B A)) dropout(x)`, where `*` multiplies elementwise.

    `A` is `[rank, in]` and `B` is `[out, rank]`, both used in the weight's dtype; there is no scaling. The update can
    have the rank of `W` times `rank`, with the parameters of LoRA at this rank. `B` is initialised to zeros, so the
    model is initially unchanged, and `W' = W * (1 + B A)` folds exactly.

    Linear maps are layers, convolutions (`in` counts the entries of a patch), embedding tables, and experts (one pair
    of factors each). A forward pass materialises the whole update, a matrix of the weight's size, at every site, and
    one such matrix for each row of a batch whose rows choose among the adaptations of a bank; only a table multiplies
    just the entries that it looks up.

    On top of other adaptations of a site, `W` is the effective weight after them. They must fold.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR, SiteKind.EMBEDDING, SiteKind.EXPERTS}),
        identity_at_init=True,
        folds=FoldKind.EXACT,
        bankable=True,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = (
        "Huang et al. 2025, HiRA: Parameter-Efficient Hadamard High-Rank Adaptation for Large Language Models"
    )

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("HIRA",),
        parts={
            "A": PeftPart("hira_A", "down", "hira_embedding_A"),
            "B": PeftPart("hira_B", "up", "hira_embedding_B"),
        },
        fields={"r": "rank", "hira_dropout": "dropout"},
        starts={
            "init_weights": {True: {"init": "kaiming"}, "gaussian": {"init": "gaussian"}, False: {"init": "random"}}
        },
        # PEFT 0.21 gives every module the rank `r`, whatever this field says.
        fixed={"rank_pattern": {}},
        ignored=frozenset({"init_weights"}),
        training=frozenset({"dropout", "init", "excess_rank"}),
        turned=True,
        layers=frozenset({"Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "Embedding"}),
        kernels="ungrouped",
    )

    method: Literal["hira"] = "hira"
    """The method's tag."""

    rank: int = Field(default=32, ge=1, le=SIZE)
    """Rank of the factors; at most min(in, out) of every site."""

    excess_rank: bool = False
    """Accept a rank above min(in, out) of a site, which adds parameters but no freedom, as checkpoints of PEFT may."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training; the indices of a table are never dropped."""

    init: Start = "kaiming"
    """`kaiming`: A uniform in ±1/sqrt(in), B zero. `gaussian`: A normal with standard deviation 1/rank, B zero; a
    convolution starts as with `kaiming`, as in PEFT. In an embedding table both make A zero and B standard normal.
    `random`: A and B standard normal, so the model is another one from the start."""

    overrides: Items[HiRAOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""
