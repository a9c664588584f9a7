"""Results of the commands that generate text."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftc.cli.results.base import DiagnosticData, Result
from graftc.specs.base_model import Items

__all__ = ["AnswerData", "ChatResult", "GenerateResult", "GeneratedData", "SpokenResult", "TurnData"]


class AnswerData(Result):
    """What a model said."""

    text: str
    """Its text, without special tokens."""

    ids: Items[int]
    """The new tokens, those that end a text included."""

    prompt_tokens: int = Field(ge=1)
    """Tokens of the prompt."""

    cached: int = Field(ge=0)
    """How many of these had been computed for an earlier answer."""

    new_tokens: int = Field(ge=0)
    """How many tokens are new."""

    finish: Literal["stop", "length", "interrupted"]
    """Why it ends: the model ended it, it is as long as it may be, or somebody stopped it."""

    first_token_seconds: float | None = Field(ge=0)
    """When the first token was there; null where all came at once, as with beams."""

    seconds: float = Field(ge=0)
    """How long it took."""

    tokens_per_second: float | None = Field(ge=0)
    """Of the tokens behind the first one, which waits for the prompt; null where there are none."""


class GeneratedData(AnswerData):
    """What follows a prompt."""

    prompt: str
    """The prompt."""


class TurnData(AnswerData):
    """A turn of a conversation."""

    said: str
    """What the user said."""


class SpokenResult(Result):
    """Who answered, and how. What is null of drawing tokens is as the model's `generation_config` says."""

    path: str
    """The DIR argument."""

    kind: Literal["artifact", "model", "onnx", "peft"]
    """What it holds: an artifact, a whole model, or an adapter of PEFT's."""

    adapter: str | None
    """The `--adapter` option."""

    base: bool
    """Whether the base answered, without adaptations."""

    max_new_tokens: int = Field(ge=1)
    """Tokens of an answer at most."""

    sample: bool | None
    """Whether tokens were drawn."""

    temperature: float | None
    """What logits were divided by."""

    top_k: int | None
    """From how many tokens was drawn."""

    top_p: float | None
    """What probability these had together."""

    num_beams: int | None
    """Beams of the search."""

    seed: int | None
    """Seed of what was drawn, for each answer."""

    use_cache: bool
    """Whether keys and values of tokens were kept."""

    warnings: Items[DiagnosticData]
    """Warnings."""


class GenerateResult(SpokenResult):
    """`graftc generate DIR --json`."""

    chat: bool
    """Whether prompts were put into the chat template."""

    answers: Items[GeneratedData]
    """One for each prompt, in their order; fewer where it was interrupted."""


class ChatResult(SpokenResult):
    """`graftc chat DIR --json`."""

    system: str | None
    """The `--system` option."""

    turns: Items[TurnData]
    """All turns in their order, those before `/reset` too."""
