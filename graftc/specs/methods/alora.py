"""aLoRA: a low-rank update that acts only from a given sequence of tokens on."""

from __future__ import annotations

import math
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from graftc.specs.base import Invoked, Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.overrides import RankOverride
from graftc.specs.peft import LORA_FIXED, LORA_IGNORED, LORA_STARTS, PeftFormat, PeftPart
from graftc.specs.spec_errors import refuse

_FROM_WEIGHT = ("pissa", "olora")
"""Initialisers of LoRA that aLoRA does not support."""


class ALoRA(Invoked, MethodSpec):
    """Activated LoRA: `y = W x + b + s B A x` from the invocation's first token on, and `y = W x + b` before it.

    The invocation is a sequence of token ids, such as those of `<|check|>`. In each row of a batch, its last occurrence
    counts; a row without it is not adapted at all. The keys and values of earlier tokens equal the base's bit for bit,
    so that a cache that the base has filled can be continued with the adaptation, and several adaptations can share it.

    Attention must be causal. The positions are found in `input_ids`; a call without them, or one that continues a cache
    after the invocation, gets them from the cache or from the input `NAME_start` (`alora_start`): `int64[rows]`, the
    position of each row's first adapted token, counted from the row's first token including padding and what is in the
    cache, or -1 for a row that is not adapted.

    Padding counts as text, as it does in PEFT: an invocation among masked tokens is found like any other. A padding
    token should therefore not be part of the invocation. A position beyond the text adapts none of its tokens; in
    `generate`, it adapts the tokens that are generated from there on.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.LINEAR}),
        identity_at_init=True,
        folds=FoldKind.NONE,
        bankable=True,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = "Greenewald et al. 2025, Activated LoRA: Fine-tuned LLMs for Intrinsics (arXiv:2504.12397)"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("LORA",),
        parts={"A": PeftPart("lora_A.weight", "down"), "B": PeftPart("lora_B.weight", "up")},
        when={"use_dora": False},
        marker="alora_invocation_tokens",
        fields={
            **{"r": "rank", "lora_alpha": "alpha", "use_rslora": "rslora", "lora_dropout": "dropout"},
            **{"init_lora_weights": "init", "alora_invocation_tokens": "invocation"},
        },
        values={"init_lora_weights": {key: word for key, word in LORA_STARTS.items() if word not in _FROM_WEIGHT}},
        starts={"init_lora_weights": {True: {"init": "kaiming"}, "gaussian": {"init": "gaussian"}}},
        patterns={"rank_pattern": "rank", "alpha_pattern": "alpha"},
        constant={"dropout_scope": "target"},
        absent={"alpha": 8.0},
        fixed={**{name: off for name, off in LORA_FIXED.items() if name != "alora_invocation_tokens"}, "bias": "none"},
        ignored=LORA_IGNORED,
        document=frozenset({"layer_replication"}),
        training=frozenset({"dropout", "dropout_mask", "dropout_scope", "init", "excess_rank"}),
        turned=True,
    )

    method: Literal["alora"] = "alora"
    """The method's tag."""

    invocation: Items[Annotated[int, Field(ge=0)]] = Field(
        examples=[[5, 9]], max_length=SIZE, json_schema_extra={"minItems": 1}
    )
    """The token ids from whose last occurrence on a row is adapted, in order:
    `tokenizer(text, add_special_tokens=False).input_ids`."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site."""

    excess_rank: bool = False
    """Accept a rank above min(in, out) of a site, which adds parameters but no freedom, as checkpoints of PEFT may."""

    alpha: float = Field(default=16.0, gt=0)
    """Numerator of the scaling."""

    rslora: bool = False
    """Scale by `alpha / sqrt(rank)`, which keeps the magnitude of updates similar across ranks."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""

    dropout_mask: Literal["saved", "recomputed"] = "saved"
    """The saved form of the dropout mask: the mask itself, or a seed from which the backward pass recomputes it (less
    memory, more time)."""

    dropout_scope: Literal["input", "target"] = "input"
    """`input`: the sites of the adaptation that read the same input share one mask, which saves memory. `target`: each
    site has its own mask, as in PEFT."""

    init: Literal["kaiming", "gaussian"] = "kaiming"
    """`kaiming`: A uniform in ±1/sqrt(in), B zero. `gaussian`: A normal with standard deviation 1/rank, B zero."""

    overrides: Items[RankOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @field_validator("invocation")
    @classmethod
    def _invocation_has_tokens(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if not value:
            refuse((), "aLoRA needs the token ids of its invocation", hint="lora adapts all tokens")
        return value

    @property
    def scaling(self) -> float:
        """The factor of the branch: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora`."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)
