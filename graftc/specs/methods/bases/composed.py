"""The common base of methods composed of other methods, one for each kind of site."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graftc.specs.base import MethodSpec, SpecModel
from graftc.specs.claims import SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bottleneck import WIDTHS, Activation, BottleneckWidth, Init
from graftc.specs.methods.prefix import Reparameterization
from graftc.specs.target import written_fields

PARTS: Mapping[SiteKind, str] = {SiteKind.SUBLAYER: "adapter", SiteKind.ATTENTION: "prefix", SiteKind.LINEAR: "lora"}
"""The part at each kind of site."""


class AdapterPart(BottleneckWidth):
    """The bottleneck adapters of a method that combines them with other parts."""

    activation: Activation = "relu"
    """The activation function between the two projections."""

    init: Init = "lora"
    """How the projections are initialised, as in `bottleneck`."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an entry of the bottleneck during training."""

    def fields(self, default: Mapping[str, Any]) -> dict[str, Any]:
        """Return the values for an adapter's spec; ``default`` is its width if none is set."""
        values = {f: getattr(self, f) for f in type(self).model_fields if f not in WIDTHS}
        return {**values, **(self.given_widths() or default)}


class PrefixPart(SpecModel):
    """The prefix of a method that combines it with other parts."""

    length: int = Field(default=10, ge=1, le=SIZE)
    """Number of positions in the prefix."""

    reparameterization: Reparameterization | None = Reparameterization()
    """The network that produces the keys and values during training; `null` trains them directly."""

    positions: Literal["unshifted", "shifted"] = "unshifted"
    """Whether the text keeps its positions, or begins after the prefix."""

    window: Literal["visible", "masked"] = "visible"
    """Whether a sliding window leaves the prefix visible, or hides it as it would hide tokens at these positions."""

    init_std: float = Field(default=1.0, gt=0)
    """Standard deviation of the normal initialisation of the keys and values; of the vectors, with a
    reparameterisation."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an entry of the prefix during training."""

    def fields(self) -> dict[str, Any]:
        """Return the values for a prefix's spec."""
        return {f: getattr(self, f) for f in type(self).model_fields}


class PartsSpec(MethodSpec):
    """A method composed of others: adapters at sublayers, a prefix at attentions, low-rank updates at linear maps.
    Without a target, every part is at its own sites.
    """

    roles: ClassVar[Mapping[str, tuple[str, ...]]]
    """The default sites of each part."""

    prefix: PrefixPart = PrefixPart()
    """The keys and values prepended to those of every attention."""

    @model_validator(mode="before")
    @classmethod
    def _every_part_at_its_places(cls, data: Any) -> Any:
        """Select the default sites of the parts in use unless the target selects sites."""
        if not isinstance(data, Mapping):
            return data
        fields = written_fields(data.get("target", {}))
        parts = cls.named_parts(data.get("parts"))
        if not isinstance(fields, Mapping) or not parts or {"role", "modules", "regex"} & fields.keys():
            return data
        roles = [role for part, own in cls.roles.items() if part in parts for role in own]
        return {**data, "target": {**fields, "role": roles}}

    @classmethod
    def named_parts(cls, value: Any) -> Collection[str]:
        """Return the parts of a spec with this value of ``parts``; empty if the value is not valid."""
        return tuple(cls.roles)

    def part_specs(self) -> Mapping[SiteKind, MethodSpec]:
        """Return the spec of the part for each kind of place."""
        raise NotImplementedError

    def collapse(self) -> Self | None:
        """Return the spec with trained keys and values instead of the network that produces them, None without one."""
        if SiteKind.ATTENTION not in self.part_specs() or self.prefix.reparameterization is None:
            return None
        return self.model_copy(update={"prefix": self.prefix.model_copy(update={"reparameterization": None})})
