"""Bottleneck adapters: a small two-layer function beside part of the model, with all options."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import Items, MethodSpec, Override, SpecModel
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.spec_errors import refuse
from graftc.specs.target import Target

Activation = Literal["relu", "gelu", "gelu_tanh", "silu", "tanh", "leaky_relu", "identity"]
"""The function between the two projections; `silu` is also called swish, `gelu_tanh` is GELU's tanh approximation."""

Init = Literal["lora", "bert", "houlsby", "xavier"]
"""The initialisation of the projections."""

Norm = Literal["none", "before", "after", "both"]
"""The position of the adapter's own layer norm."""

Place = Literal["stream", "normed", "inner", "projection", "branch", "sum", "output", "input"]
"""A value of a sublayer, or the input or output of a linear map."""

_ORDER: tuple[Place, ...] = ("stream", "normed", "inner", "projection", "branch", "sum", "output")
WIDTHS = ("bottleneck", "reduction")
"""The two fields that can set the width of a bottleneck."""
_GOALS: frozenset[Place] = frozenset({"inner", "projection", "branch", "output"})


@dataclass(frozen=True)
class Wiring:
    """The value that an adapter reads, and the value that it adds its result to.

    Attributes:
        reads: in a sublayer ``stream`` (the residual stream), ``normed`` (the input of the sublayer), ``inner`` (the
            input of its last linear map), ``projection`` (the result of that map), ``branch`` (the same after dropout,
            before the residual is added), ``sum`` or ``output`` (the sum, or its norm if one follows); of a linear map
            ``input`` or ``output``.
        adds_to: ``inner``, ``projection``, ``branch`` or ``output``; of a linear map ``input`` or ``output``. If it
            precedes the value that is read, everything in between is computed a second time.
        norm: a layer norm of the adapter's own, before its first projection, after its second, or both.
    """

    reads: Place
    adds_to: Place
    norm: Norm = "none"


class BottleneckOverride(Override):
    """Other values of a bottleneck adapter for some of its sites; omitted fields keep the adaptation's value."""

    bottleneck: int | None = Field(default=None, ge=1, le=SIZE)
    """Width of the bottleneck at these sites."""

    reduction: float | None = Field(default=None, gt=0)
    """Input width divided by bottleneck width at these sites."""

    scale: float | None = None
    """Factor applied to the result at these sites."""

    dropout: float | None = Field(default=None, ge=0, lt=1)
    """Probability of dropping an entry of the bottleneck at these sites."""


class BottleneckWidth(SpecModel):
    """The two fields that can set the width of a bottleneck."""

    bottleneck: int | None = Field(default=None, ge=1, le=SIZE)
    """Width of the bottleneck. Give this or `reduction`."""

    reduction: float | None = Field(default=None, gt=0)
    """Input width divided by bottleneck width, rounded down: 16 turns 768 into 48."""

    @model_validator(mode="after")
    def _one_width(self) -> Self:
        if len(self.given_widths()) == 2:
            message = "bottleneck and reduction both set the width of the bottleneck"
            refuse("reduction", message, hint="remove one of them")
        return self

    def given_widths(self) -> dict[str, float]:
        """Return the widths that the user set, by field."""
        return {f: own for f in WIDTHS if f in self.model_fields_set and (own := getattr(self, f)) is not None}


class BottleneckSpec(BottleneckWidth, MethodSpec):
    """Fields common to all bottleneck adapters. A subclass defines what they read and where they add."""

    wired: ClassVar[Wiring]
    """The values that they read and the places where they add, if these are the same at all sites."""

    activation: Activation = "relu"
    """The activation function between the two projections."""

    bias: bool = True
    """Both projections have a bias."""

    init: Init = "lora"
    """How the projections are initialised; biases start at zero. `lora`: the first uniform in ±1/sqrt(in), the second
    zero, so the model is initially unchanged. `bert`: both normal with standard deviation 0.02. `houlsby`: both normal
    with standard deviation 0.001, truncated at twice that. `xavier`: both uniform in ±sqrt(6 / (in + out))."""

    init_std: float | None = Field(default=None, gt=0)
    """A different standard deviation for `bert` or `houlsby`."""

    scale: float | Literal["learned"] = 1.0
    """Factor applied to the result; `learned`: a trainable scalar, initialised to 1."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an entry of the bottleneck during training."""

    overrides: Items[BottleneckOverride] = ()
    """Other values for some sites; the first override that matches a site applies."""

    @model_validator(mode="after")
    def _deviation_is_used(self) -> Self:
        if self.init_std is not None and self.init not in ("bert", "houlsby"):
            message = f"init_std has no effect with init: {self.init}"
            refuse("init_std", message, hint="use init: bert or init: houlsby")
        return self

    def displaced_by(self, changes: Mapping[str, object]) -> Collection[str]:
        """Return both widths if an override sets either, since it replaces the adaptation's width in any form."""
        return WIDTHS if changes.keys() & set(WIDTHS) else ()

    def width(self, read: int) -> int:
        """Return the width of the bottleneck for an input of width ``read``; 0 if `reduction` leaves nothing."""
        defaults = {f: type(self).model_fields[f].default for f in WIDTHS}
        widths = self.given_widths() or {f: own for f, own in defaults.items() if own is not None}
        return int(widths["bottleneck"]) if "bottleneck" in widths else int(read // widths["reduction"])

    def wiring(self, kind: SiteKind, roles: Collection[str]) -> Wiring:
        """Return the value that the adapter reads at a site, and the value that it adds to.

        Args:
            kind: the kind of the site: a sublayer or a linear map.
            roles: the roles of the site.
        """
        return self.wired


class Bottleneck(BottleneckSpec):
    """Bottleneck adapter: `value + scale * up(activation(down(read)))`, wired by `reads` and `adds_to`.

    On a sublayer (an attention or a feed-forward part with its residual), it can read and add at any of the sublayer's
    values; on a linear map, at its input or output. Named adapters from the literature are separate methods (`houlsby`,
    `pfeiffer`, `bapna_firat`, `adapter_l`, `he_parallel`, `he_sequential`, `llm_adapters`).
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.SUBLAYER, SiteKind.LINEAR}),
        identity_at_init=True,
        folds=FoldKind.NONE,
        bankable=True,
    )
    paper: ClassVar[str] = "Houlsby et al. 2019, Parameter-Efficient Transfer Learning for NLP"

    method: Literal["bottleneck"] = "bottleneck"
    """The method's tag."""

    target: Target = Target(role="ffn.sublayer")
    """The sites of the model to adapt; by default the feed-forward part of every layer."""

    reduction: float | None = Field(default=16.0, gt=0)
    """Input width divided by bottleneck width, rounded down: 16 turns 768 into 48."""

    reads: Place | None = None
    """The adapter's input. Sublayers have `stream`, `normed`, `inner`, `projection`, `branch` (the default), `sum` and
    `output`; linear maps have `input` (the default) and `output`."""

    adds_to: Place | None = None
    """Where the result is added: `inner`, `projection`, `branch` (the default) or `output` of a sublayer, `input` or
    `output` (the default) of a linear map. If this point comes before the one that is read, the computation in between
    is repeated."""

    norm: Norm = "none"
    """The adapter's own layer norm: `before` the first projection, `after` the second, or `both`."""

    @model_validator(mode="after")
    def _wired_one_way(self) -> Self:
        reads, adds_to = self.reads, self.adds_to
        linear = "input" in (reads, adds_to)
        odd = [p for p in (reads, adds_to) if linear and p not in (None, "input", "output")]
        if odd:
            message = f"a linear map has an input and an output, but no '{odd[0]}'"
            refuse("reads" if reads == odd[0] else "adds_to", message, hint="use input or output for both")
        if adds_to == "input" and reads is None:
            message = "an adapter that adds to the input of a linear map must read it"
            refuse("adds_to", message, hint="add reads: input")
        if not linear and adds_to is not None and adds_to not in _GOALS:
            message = f"an adapter cannot add to the {adds_to} of a sublayer"
            refuse("adds_to", message, hint="it may add to inner, projection, branch or output")
        read = reads or "branch"
        if not linear and adds_to in ("inner", "projection") and _ORDER.index(read) > _ORDER.index(adds_to):
            refuse(
                "adds_to",
                f"an adapter cannot read {read} and add to {adds_to}, which comes earlier",
                hint="let it add to branch",
            )
        return self

    def wiring(self, kind: SiteKind, roles: Collection[str]) -> Wiring:
        """Return the wiring from `reads`, `adds_to` and `norm`, with defaults that depend on the kind of site."""
        if kind is SiteKind.LINEAR:
            return Wiring(self.reads or "input", self.adds_to or "output", self.norm)
        return Wiring(self.reads or "branch", self.adds_to or "branch", self.norm)
