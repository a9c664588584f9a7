"""Prompt tuning: trained token embeddings among those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec, VirtualRun
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import PeftFormat, PeftPart
from graftc.specs.spec_errors import refuse
from graftc.specs.target import Target


class VirtualTokenSpec(MethodSpec):
    """Fields common to methods that train the embeddings of virtual tokens."""

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.VALUE}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )

    target: Target = Target(role="embed.token")
    """The sequence to adapt. In an encoder-decoder model the default is the encoder's; `decoder.embed.token` is the
    other."""

    length: int = Field(default=100, ge=1, le=SIZE)
    """Number of virtual tokens; in front of the text, if there are infix ones too."""

    init: Literal["uniform", "normal", "vocabulary", "tokens"] = "uniform"
    """How the vectors are initialised. `uniform`: between -0.5 and 0.5. `normal`: with standard deviation `init_std`.
    `vocabulary`: the embeddings of tokens drawn from the first `init_vocabulary` ids. `tokens`: the embeddings of
    `init_tokens`."""

    init_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal initialisation."""

    init_vocabulary: int = Field(default=5000, ge=1)
    """Number of ids from which tokens are drawn: in most vocabularies the first ids are the most common tokens."""

    init_tokens: Items[int | Items[int]] = ()
    """With `init: tokens`, the id from which each virtual token is initialised, or a list of ids whose mean is used,
    for a word of several pieces. If there are fewer entries than virtual tokens, the remaining ones are drawn as with
    `vocabulary`."""

    @property
    def total(self) -> int:
        """The total number of virtual tokens."""
        return sum(run.length for run in self.virtual_tokens())

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if bool(self.init_tokens) != (self.init == "tokens"):
            refuse("init_tokens", "init_tokens and init: tokens need each other", hint="set both or neither")
        if len(self.init_tokens) > self.total:
            refuse(
                "init_tokens",
                f"init_tokens has {len(self.init_tokens)} tokens for {self.total} virtual tokens",
            )
        return self


class Prompt(VirtualTokenSpec):
    """Prompt tuning: inserts `length` trained vectors among the token embeddings of the text.

    They take part in every layer like tokens: they have positions, and every token that may attend to them does. Their
    outputs are removed from the model's outputs, and a head that reads the first token reads the first token of the
    text. Nothing folds: the tokens remain and make the text longer by `length`.
    """

    paper: ClassVar[str] = "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("PROMPT_TUNING", "P_TUNING"),
        parts={"tokens": PeftPart("prompt_embeddings")},
        joined=("prompt_embeddings", 0),
        fields={"num_virtual_tokens": "length"},
        constant={"placement": "front"},
        starts={
            "prompt_tuning_init": {
                "RANDOM": {"init": "normal"},
                "SAMPLE_VOCAB": {"init": "vocabulary", "init_vocabulary": 2**31},
            },
            "encoder_reparameterization_type": {},
        },
        ignored=frozenset(
            {
                *("prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs"),
                *("encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout"),
            }
        ),
        training=frozenset({"init", "init_std", "init_vocabulary", "init_tokens"}),
    )

    method: Literal["prompt"] = "prompt"
    """The method's tag."""

    placement: Literal["front", "after_bos", "suffix"] = "front"
    """Where they are inserted. `after_bos`: after the first token of each row, for texts without left padding.
    `suffix`: after the last real token of each row, according to the attention mask."""

    def virtual_tokens(self) -> Sequence[VirtualRun]:
        """Return one run of `length` tokens in its position."""
        return (VirtualRun(self.length, self.placement),)
