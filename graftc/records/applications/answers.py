"""Answers of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from annotated_types import Ge

from graftc.records.fields import Seconds
from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class Answer(Record, behind={"cached": ("new_tokens",), "seconds": ("tokens_per_second",)}):
    """An answer of a model."""

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

    seconds: Seconds

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
    """A continuation of a prompt."""

    prompt: str
    """The prompt."""


@dataclass(frozen=True)
class Turn(Answer):
    """A turn of a conversation."""

    said: str
    """The user's message."""


@dataclass(frozen=True)
class Settings(Record):
    """How answers are generated; null is as the model's ``generation_config`` says."""

    max_new_tokens: Annotated[int, Ge(1)] = 256
    """Tokens of an answer at most."""

    sample: bool | None = None
    """Whether tokens were drawn."""

    temperature: float | None = None
    """The divisor of logits."""

    top_k: int | None = None
    """From how many tokens was drawn."""

    top_p: float | None = None
    """The probability of these tokens together."""

    num_beams: int | None = None
    """Beams of the search."""

    seed: int | None = None
    """Seed of what was drawn, for each answer."""

    use_cache: bool = True
    """Whether keys and values of tokens were kept."""

    def options(self) -> dict[str, Any]:
        """Return the arguments of ``generate``."""
        arguments = {
            **{"do_sample": self.sample, "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p},
            **{"num_beams": self.num_beams, "max_new_tokens": self.max_new_tokens},
        }
        return {**{name: value for name, value in arguments.items() if value is not None}, "use_cache": self.use_cache}
