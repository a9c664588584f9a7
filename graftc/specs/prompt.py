"""Prompt tuning: trained word vectors among those of the text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.diagnostics import GraftError
from graftc.specs.limits import SIZE
from graftc.specs.target import Target
from graftc.specs.validation import reject
from graftc.specs.virtual import VirtualRun

__all__ = ["Prompt", "VirtualTokenSpec"]


class VirtualTokenSpec(MethodSpec):
    """What methods have in common that train the vectors of virtual tokens."""

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.VALUE}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )

    target: Target = Target(role="embed.token")
    """Which sequence it is for. In a model of two stacks that is the encoder's; `decoder.embed.token` is the other."""

    length: int = Field(default=100, ge=1, le=SIZE)
    """How many virtual tokens there are; in front, where there are infix ones too."""

    init: Literal["uniform", "normal", "vocabulary", "tokens"] = "uniform"
    """How the vectors are initialised. `uniform`: between -0.5 and 0.5. `normal`: with standard deviation `init_std`.
    `vocabulary`: the embeddings of tokens drawn from the first `init_vocabulary` ids. `tokens`: the embeddings of
    `init_tokens`."""

    init_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal initialisation."""

    init_vocabulary: int = Field(default=5000, ge=1)
    """How many ids tokens are drawn from: the most common ones are the first of most vocabularies."""

    init_tokens: Items[int | Items[int]] = ()
    """With `init: tokens`, the id that each virtual token starts from, or a list of ids, whose mean it starts from, for
    a word of several pieces. Where there are fewer than virtual tokens, the others are drawn as by `vocabulary`."""

    @property
    def total(self) -> int:
        """How many virtual tokens there are in all."""
        return sum(run.length for run in self.virtual_tokens())

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if bool(self.init_tokens) != (self.init == "tokens"):
            message = "init_tokens are what init: tokens starts from"
            reject(self.init_tokens, (("init_tokens",), GraftError("GC002", message, hint="give both or neither")))
        if len(self.init_tokens) > self.total:
            message = f"{len(self.init_tokens)} tokens to start from, for {self.total} virtual ones"
            reject(self.init_tokens, (("init_tokens",), GraftError("GC002", message)))
        return self


class Prompt(VirtualTokenSpec):
    """Prompt tuning: `length` trained vectors stand among the word vectors of the text.

    They take part in every layer as tokens do: they have positions, and everything that may look at them does. What the
    model gives for them is left out of its outputs, and a head that takes the first token takes the text's. Nothing of
    it folds: the tokens stay, at the cost of a text that is longer by so many.
    """

    paper: ClassVar[str] = "Lester et al. 2021, The Power of Scale for Parameter-Efficient Prompt Tuning"

    method: Literal["prompt"] = "prompt"
    """The method's tag."""

    placement: Literal["front", "after_bos", "suffix"] = "front"
    """Where they stand. `after_bos`: behind the first token of each row, where texts are not padded on the left.
    `suffix`: behind the last real token of each row, by the attention mask."""

    def virtual_tokens(self) -> Sequence[VirtualRun]:
        """See `MethodSpec.virtual_tokens`."""
        return (VirtualRun(self.length, self.placement),)
