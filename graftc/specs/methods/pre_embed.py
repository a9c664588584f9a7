"""PreEmbed: trained token embeddings in front of a text and within it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

from pydantic import Field

from graftc.specs.base import VirtualRun, Where
from graftc.specs.limits import SIZE
from graftc.specs.methods.prompt import VirtualTokenSpec


class InfixSpec(VirtualTokenSpec):
    """Fields common to PreEmbed and PreLayer: virtual tokens in front of the text and within it."""

    infix: int = Field(default=0, ge=0, le=SIZE)
    """Number of virtual tokens within the text."""

    infix_after: int | None = Field(default=None, ge=0, le=SIZE)
    """The id of a token: the infix tokens are inserted after the first token with this id in each row, for example a
    separator between a question and its answer. Without it, or in a row without such a token, they are inserted after
    the last real token."""

    def virtual_tokens(self) -> Sequence[VirtualRun]:
        """Return the run in front of the text, and the one within it if there is one."""
        front = VirtualRun(self.length, "front")
        where: Where = "suffix" if self.infix_after is None else self.infix_after
        return (front, VirtualRun(self.infix, where)) if self.infix else (front,)


class PreEmbed(InfixSpec):
    """PreEmbed: virtual tokens with trained embeddings, `length` in front of the text and `infix` within it.

    Everything else is as in `prompt`.
    """

    mechanism: ClassVar[str | None] = "prompt"
    paper: ClassVar[str] = "Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models"

    method: Literal["pre_embed"] = "pre_embed"
    """The method's tag."""

    init: Literal["uniform", "normal", "vocabulary", "tokens"] = "vocabulary"
    """How the vectors are initialised. `uniform`: between -0.5 and 0.5. `normal`: with standard deviation `init_std`.
    `vocabulary`: the embeddings of tokens drawn from the first `init_vocabulary` ids. `tokens`: the embeddings of
    `init_tokens`."""
