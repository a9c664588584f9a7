"""PreEmbed: trained word vectors in front of a text and within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.limits import SIZE
from graftc.specs.prompt import VirtualTokenSpec
from graftc.specs.virtual import VirtualRun, Where

__all__ = ["InfixSpec", "PreEmbed"]


class InfixSpec(VirtualTokenSpec):
    """What PreEmbed and PreLayer have in common: virtual tokens in front, and within."""

    infix: int = Field(default=0, ge=0, le=SIZE)
    """How many virtual tokens stand within the text."""

    infix_after: int | None = Field(default=None, ge=0, le=SIZE)
    """The id of a token: infix ones stand behind the first one of this id in each row, for example a separator between
    a question and its answer. Without it, or in a row that has none, behind the last real token."""

    def virtual_tokens(self) -> Sequence[VirtualRun]:
        """See `MethodSpec.virtual_tokens`."""
        front = VirtualRun(self.length, "front")
        where: Where = "suffix" if self.infix_after is None else self.infix_after
        return (front, VirtualRun(self.infix, where)) if self.infix else (front,)


class PreEmbed(InfixSpec):
    """PreEmbed: virtual tokens with trained word vectors, `length` in front of the text and `infix` within.

    Everything else is as for `prompt`.
    """

    paper: ClassVar[str] = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"

    method: Literal["pre_embed"] = "pre_embed"
    """The method's tag."""

    init: Literal["uniform", "normal", "vocabulary", "tokens"] = "vocabulary"
    """How the vectors are initialised. `uniform`: between -0.5 and 0.5. `normal`: with standard deviation `init_std`.
    `vocabulary`: the embeddings of tokens drawn from the first `init_vocabulary` ids. `tokens`: the embeddings of
    `init_tokens`."""
