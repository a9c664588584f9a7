"""UniPELT: adapters, a prefix and low-rank updates together, each with its own gates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field, field_validator

from graftc.specs.base import Items, MethodSpec, SpecModel
from graftc.specs.claims import Claims, FoldKind, SiteKind
from graftc.specs.limits import SIZE
from graftc.specs.methods.bases.composed import PARTS, AdapterPart, PartsSpec
from graftc.specs.methods.bottleneck import Init
from graftc.specs.methods.lora import LoRA
from graftc.specs.methods.pfeiffer import Pfeiffer
from graftc.specs.methods.prefix import Prefix
from graftc.specs.spec_errors import first_repeat, refuse
from graftc.specs.target import Target

Part = Literal["adapter", "prefix", "lora"]


class UniPELTAdapter(AdapterPart):
    """The adapters of UniPELT, wired as `pfeiffer`; if no width is given, their reduction is 16."""

    init: Init = "bert"
    """How the projections are initialised: `bert`, normal with standard deviation 0.02."""


class LoRAPart(SpecModel):
    """The low-rank updates of UniPELT, whose gates replace alpha over rank."""

    rank: int = Field(default=8, ge=1, le=SIZE)
    """Rank of the update; at most min(in, out) of every site."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping an input of the branch during training."""


class UniPELT(PartsSpec):
    """UniPELT: adapters, a prefix and low-rank updates in every layer, each multiplied by its own gate.

    A gate is a number between 0 and 1 for each row and site, the mean over tokens of `sigmoid(w x + b)`, where `x` is
    the part's input. The adapters are Pfeiffer's, `g + G(u) A(u)`; keys and values of the prefix are both multiplied by
    one gate, which reads the attention's input; queries and values have updates `G(x) B A x`, with the gate in place of
    alpha over rank. `parts: [adapter, prefix]` is the paper's AP, all three parts are its APL.

    Gates are initially close to one half. Closed gates remove adapters and updates, but not the prefix: its keys are
    then zeros, which take part in the softmax. A gate depends on the row, so nothing folds.
    """

    claims: ClassVar[Claims] = Claims(
        sites=frozenset({SiteKind.ATTENTION, SiteKind.SUBLAYER, SiteKind.LINEAR}),
        identity_at_init=False,
        folds=FoldKind.NONE,
        up=frozenset({"B"}),
    )
    paper: ClassVar[str] = "Mao et al. 2022, UniPELT: A Unified Framework for Parameter-Efficient Language Model Tuning"
    roles: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "adapter": ("ffn.sublayer",),
        "prefix": ("attn",),
        "lora": ("attn.q", "attn.v"),
    }

    method: Literal["unipelt"] = "unipelt"
    """The method's tag."""

    target: Target = Target(role=["ffn.sublayer", "attn", "attn.q", "attn.v"])
    """The sites of the model to adapt; by default those of its parts: the feed-forward part of every layer, every
    attention, queries and values."""

    parts: Items[Part] = Field(
        default=("adapter", "prefix", "lora"), json_schema_extra={"minItems": 1, "uniqueItems": True}
    )
    """The parts to use."""

    tokens: Literal["all", "real"] = "all"
    """The tokens over which a gate is averaged. `all`: padding too, as in the paper, so a gate depends on the length of
    the padding. `real`: tokens that the attention mask does not exclude."""

    adapter: UniPELTAdapter = UniPELTAdapter()
    """The adapters after the feed-forward parts."""

    lora: LoRAPart = LoRAPart()
    """The low-rank updates of queries and values."""

    @field_validator("parts")
    @classmethod
    def _parts_are_told_apart(cls, value: tuple[Part, ...]) -> tuple[Part, ...]:
        if not value:
            refuse((), f"the parts are: {', '.join(get_args(Part))}")
        if (index := first_repeat(value)) is not None:
            refuse(index, f"'{value[index]}' is listed twice")
        return value

    @classmethod
    def named_parts(cls, value: Any) -> Collection[str]:
        """Return the named parts, or all of them if none are named; empty if the value is not valid."""
        if value is None:
            return tuple(cls.roles)
        named = isinstance(value, list | tuple) and all(isinstance(part, str) and part in cls.roles for part in value)
        return tuple(value) if named else ()

    def part_specs(self) -> Mapping[SiteKind, MethodSpec]:
        """Return the specs of the parts in use, by the kind of their sites."""
        lora = {"rank": self.lora.rank, "alpha": float(self.lora.rank), "dropout": self.lora.dropout}
        specs: Mapping[str, MethodSpec] = {
            "adapter": Pfeiffer(**self.adapter.fields({"reduction": 16.0})),
            "prefix": Prefix(**self.prefix.fields()),
            "lora": LoRA(target=Target(role="attn.q"), **lora),
        }
        return {kind: specs[part] for kind, part in PARTS.items() if part in self.parts}
