"""Prefix tuning: trained keys and values in front of those of every attention."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec, Override, SpecModel
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.peft import PeftFormat, PeftPart
from graftc.specs.spec_errors import refuse
from graftc.specs.target import Target


class Reparameterization(SpecModel):
    """During training, a small network produces the keys and values from one vector for each position.

    It computes `W2 tanh(W1 e + b1) + b2`, where `e` are the vectors and `W1` is shared by all sites. It is evaluated
    once and not deployed.
    """

    hidden: int = Field(default=512, ge=1, le=SIZE)
    """Width of the network's hidden layer."""

    width: int | None = Field(default=None, ge=1, le=SIZE)
    """Width of the vectors. Default: the width of the queries at the first site, which in most models is the model's
    width."""


class PrefixOverride(Override):
    """A different length for some of the sites of a prefix."""

    length: int | None = Field(default=None, ge=1, le=SIZE)
    """Number of positions at these sites."""


class PrefixSpec(MethodSpec):
    """Fields common to prefix tuning and P-tuning v2."""

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.ATTENTION}), identity_at_init=False, folds=FoldKind.NONE, bankable=True
    )

    target: Target = Target(role="attn")
    """The sites of the model to adapt; by default every attention: in the encoder, in the decoder, and
    cross-attention."""

    length: int = Field(default=10, ge=1, le=SIZE)
    """Number of positions in the prefix."""

    positions: Literal["unshifted", "shifted"] = "unshifted"
    """`unshifted`: the text keeps its positions. `shifted`: it begins after the prefix, as it does when a cache holds
    the prefix (the authors' code, PEFT); learned positions must suffice for both. Where there is no text, a fixed
    number of places, such as the patches of an image, stay as they are."""

    window: Literal["visible", "masked"] = "visible"
    """`visible`: a sliding window leaves the prefix visible. `masked`: it hides the prefix as it would hide tokens at
    these positions, as it does when a cache holds the prefix (PEFT)."""

    reparameterization: Reparameterization | None = None
    """Train a small network that produces the keys and values, instead of training them directly."""

    init: Literal["normal", "tokens"] = "normal"
    """How the keys and values are initialised. `normal`: from a normal distribution with standard deviation `init_std`.
    `tokens`: to the keys and values that the base's own attention computes for `init_tokens`, read as a separate
    text."""

    init_tokens: Items[int] = ()
    """With `init: tokens`, the id of the token from which each position is initialised."""

    init_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal initialisation of the keys and values; of the vectors, with a
    reparameterisation."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an entry of the prefix during training."""

    overrides: Items[PrefixOverride] = ()
    """Other lengths for some sites; the first override that matches a site applies."""

    @model_validator(mode="after")
    def _tokens_fit(self) -> Self:
        if bool(self.init_tokens) != (self.init == "tokens"):
            refuse("init_tokens", "init_tokens and init: tokens need each other")
        if self.init_tokens and len(self.init_tokens) != self.length:
            refuse("init_tokens", f"init_tokens has {len(self.init_tokens)} tokens, but length is {self.length}")
        if self.init_tokens and self.reparameterization is not None:
            message = "with a reparameterization, keys and values cannot start from init_tokens"
            refuse("init_tokens", message)
        return self


class Prefix(PrefixSpec):
    """Prefix tuning: every query attends to `length` trained keys and values in addition to those of the text.

    They are prepended after heads are split: `softmax(q [P; K]^T) [U; V]`. Every query sees all of them, regardless of
    the text's mask, unless `window` is `masked`. They have the widths of the projected keys and values, so heads that
    share keys share the prefix, and no rotary embedding is applied to them. A position bias (T5, ALiBi) treats them as
    tokens in front of the text; a bias that is computed from activations, or is passed in as a pairwise mask, is zero
    for them. An adaptation of the bias itself must come before the prefix in `adapt`.

    The model initially differs from the base, even with zeros, because zero keys take part in the softmax. With `init:
    tokens` and `positions: shifted`, a decoder initially behaves like the base after reading these tokens before the
    text.
    """

    paper: ClassVar[str] = "Li and Liang 2021, Prefix-Tuning: Optimizing Continuous Prompts for Generation"

    peft: ClassVar[PeftFormat | None] = PeftFormat(
        types=("PREFIX_TUNING",),
        parts={part: PeftPart("prompt_embeddings") for part in ("keys", "values")},
        joined=("prompt_embeddings", 1),
        fields={"num_virtual_tokens": "length"},
        constant={"positions": "shifted", "window": "masked"},
        starts={"prefix_projection": {False: {}}, "init_weights": {None: {}}},
        ignored=frozenset({"encoder_hidden_size", "prefix_projection", "init_weights"}),
        written={"prefix_projection": lambda spec: False},
        training=frozenset({"init", "init_std", "init_tokens", "dropout"}),
    )

    method: Literal["prefix"] = "prefix"
    """The method's tag."""
