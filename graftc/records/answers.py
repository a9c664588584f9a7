"""Answers of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.specs.records.record import Record, stated

__all__ = ["Answer", "GeneratedAnswer", "Turn"]


@dataclass(frozen=True)
class Answer(Record, behind={"cached": ("new_tokens",), "seconds": ("tokens_per_second",)}):
    """What a model said."""

    text: str
    """Its text, without special tokens."""

    ids: tuple[int, ...]
    """The new tokens, those that end a text included."""

    prompt_tokens: Annotated[int, Ge(1)]
    """Tokens of the prompt."""

    cached: Annotated[int, Ge(0)]
    """How many of these had been computed for an earlier answer."""

    finish: Literal["stop", "length", "interrupted"]
    """Why it ends: the model ended it, it is as long as it may be, or somebody stopped it."""

    first_token_seconds: Annotated[float | None, Ge(0)]
    """When the first token was there; null where all came at once, as with beams."""

    seconds: Annotated[float, Ge(0)]
    """How long it took."""

    @stated
    def new_tokens(self) -> Annotated[int, Ge(0)]:
        """How many tokens are new."""
        return len(self.ids)

    @stated
    def tokens_per_second(self) -> Annotated[float | None, Ge(0)]:
        """Of the tokens behind the first one, which waits for the prompt; null where there are none."""
        if self.first_token_seconds is None:
            return len(self.ids) / self.seconds if self.ids and self.seconds > 0 else None
        took = self.seconds - self.first_token_seconds
        return (len(self.ids) - 1) / took if len(self.ids) > 1 and took > 0 else None


@dataclass(frozen=True)
class GeneratedAnswer(Answer, published="GeneratedData"):
    """What follows a prompt."""

    prompt: str
    """The prompt."""


@dataclass(frozen=True)
class Turn(Answer):
    """A turn of a conversation."""

    said: str
    """What the user said."""
