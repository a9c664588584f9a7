"""Prefix tuning: trained keys and values in front of those of every attention."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec, Override, SpecModel
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.diagnostics import GraftError
from graftc.specs.limits import SIZE
from graftc.specs.target import Target
from graftc.specs.validation import reject

__all__ = ["Prefix", "PrefixOverride", "PrefixSpec", "Reparameterization"]


class Reparameterization(SpecModel):
    """Keys and values as a small network of one vector for each position, while training.

    `W2 tanh(W1 e + b1) + b2`, where `e` are the vectors and `W1` is shared by all places. It is worked out once and
    left out of what is deployed.
    """

    hidden: int = Field(default=512, ge=1, le=SIZE)
    """Width of the network's hidden layer."""

    width: int | None = Field(default=None, ge=1, le=SIZE)
    """Width of the vectors. Default: that of the queries of the first place, which is the model's in most."""


class PrefixOverride(Override):
    """Another length for some of the places of a prefix."""

    length: int | None = Field(default=None, ge=1, le=SIZE)
    """How many positions there are at these places."""


class PrefixSpec(MethodSpec):
    """What prefix tuning and P-tuning v2 have in common."""

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.ATTENTION}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )

    target: Target = Target(role="attn")
    """Which sites of the model to adapt; by default every attention: in the encoder, in the decoder, and
    cross-attention."""

    length: int = Field(default=10, ge=1, le=SIZE)
    """How many positions the prefix has."""

    positions: Literal["unshifted", "shifted"] = "unshifted"
    """`unshifted`: the text keeps its positions. `shifted`: it begins after the prefix, as where a cache holds the
    prefix (the authors' code, PEFT); learned positions have to suffice for both."""

    window: Literal["visible", "masked"] = "visible"
    """`visible`: a window that slides leaves the prefix in sight. `masked`: it hides the prefix as it would hide tokens
    there, as where a cache holds the prefix (PEFT)."""

    reparameterization: Reparameterization | None = None
    """Train a small network that gives the keys and values, instead of themselves."""

    init: Literal["normal", "tokens"] = "normal"
    """What keys and values start from. `normal`: a normal of deviation `init_std`. `tokens`: what the base's own
    attention has for `init_tokens`, which it reads as a text of their own."""

    init_tokens: Items[int] = ()
    """With `init: tokens`, the id of the token that each position starts from."""

    init_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal initialisation of the keys and values; of the vectors, with a
    reparameterisation."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an entry of the prefix during training."""

    overrides: Items[PrefixOverride] = ()
    """Other lengths for some places; the first that matches a place holds."""

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        message = None
        if bool(self.init_tokens) != (self.init == "tokens"):
            message = "init_tokens are what init: tokens starts from"
        elif self.init_tokens and len(self.init_tokens) != self.length:
            message = f"{len(self.init_tokens)} tokens to start from, for {self.length} positions"
        elif self.init_tokens and self.reparameterization is not None:
            message = "a reparameterization gives keys and values that cannot start from those of init_tokens"
        if message is not None:
            reject(self.init_tokens, (("init_tokens",), GraftError("GC002", message)))
        return self


class Prefix(PrefixSpec):
    """Prefix tuning: every query attends to `length` trained keys and values besides those of the text.

    They stand in front, after heads are split: `softmax(q [P; K]^T) [U; V]`. Every query sees all of them, whatever the
    mask says of the text, unless `window` is `masked`. They have the widths of the projected keys and values, so heads
    that share keys share the prefix, and they are not rotated. A bias of positions (T5, ALiBi) is that of tokens in
    front of the text; what is made from activations, or comes in as a mask of pairs, is zero for them. An adaptation of
    the bias itself goes before the prefix in `adapt`.

    The model is not the base's at first, with zeros neither: keys of zeros take part in the softmax. With
    `init: tokens` and `positions: shifted`, a decoder starts as the base that has read these tokens before the text.
    """

    paper: ClassVar[str] = "Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation"

    method: Literal["prefix"] = "prefix"
    """The method's tag."""
