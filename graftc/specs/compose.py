"""Compositions: the ways in which several adaptations of the same places work together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.config import JsonDict
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from graftc.specs.base import Items, NamedSpec
from graftc.specs.errors.text import quoted
from graftc.specs.limits import ADAPTATIONS, SIZE
from graftc.specs.schema import AdaptationName
from graftc.specs.spec_errors import first_repeat, refuse

_SEVERAL: JsonDict = {"minItems": 2, "uniqueItems": True}
_SOME: JsonDict = {"minItems": 1, "uniqueItems": True}


class CompositionSpec(NamedSpec):
    """Base of all compositions: a list of adaptations under the name of its kind."""

    kind: ClassVar[str]
    least: ClassVar[int] = 2

    name: AdaptationName | None = None
    """Unique among adaptations and compositions; prefixes the tensors it owns. Default: its kind."""

    @model_validator(mode="after")
    def _members_are_told_apart(self) -> Self:
        if (index := first_repeat(self.members)) is not None:
            refuse((self.kind, index), f"{quoted(self.members[index])} is listed twice", hint="remove it")
        if len(self.members) < self.least:
            refuse(self.kind, f"{self.kind} needs at least {self.least} adaptations")
        return self

    @property
    def members(self) -> tuple[str, ...]:
        """The names of its adaptations, in order."""
        names: tuple[str, ...] = getattr(self, self.kind)
        return names


class Stack(CompositionSpec):
    """Adaptations applied one after the other at each site, in this order: each one starts from the result of those
    before it.

    Adaptations of the same sites stack by default, in spec order. Members may be other compositions.
    """

    kind: ClassVar[str] = "stack"

    stack: Items[str] = Field(json_schema_extra=_SEVERAL)
    """The adaptations or compositions, in order."""


class Average(CompositionSpec):
    """The average of adaptations that all start from the same value."""

    kind: ClassVar[str] = "average"

    average: Items[str] = Field(json_schema_extra=_SEVERAL)
    """The adaptations; all at the same sites."""

    weights: Items[float] | None = None
    """One factor for each adaptation. Default: one divided by their number."""

    of: Literal["outputs", "parameters"] = "outputs"
    """`outputs`: average the adaptations' contributions. `parameters`: average their tensors, which costs only one
    adaptation to compute, and folds if the method does; the adaptations must be identical except for their names."""

    @model_validator(mode="after")
    def _one_weight_each(self) -> Self:
        if self.weights is not None and len(self.weights) != len(self.average):
            refuse("weights", f"{len(self.weights)} weights for {len(self.average)} adaptations")
        return self

    @property
    def factors(self) -> tuple[float, ...]:
        """The factor of each member."""
        return tuple(self.weights) if self.weights is not None else (1 / len(self.average),) * len(self.average)


class Fuse(CompositionSpec):
    """AdapterFusion: attention over the adaptations' contributions, with their input as the query (Pfeiffer et al.
    2021).
    """

    kind: ClassVar[str] = "fuse"

    fuse: Items[str] = Field(json_schema_extra=_SEVERAL)
    """The adaptations; all at the same sites, reading and adding to the same values."""

    temperature: float = Field(default=1.0, gt=0)
    """Divisor of the scores before the softmax over adaptations."""

    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Probability of dropping a score during training."""

    values: bool = True
    """Multiply the adaptations' contributions by a square value matrix, initialised near the identity."""

    regularization: float = Field(default=0.01, ge=0)
    """Factor of the squared distance of the value matrix from the identity, a term added to the loss."""

    train: Literal["fusion", "all"] = "fusion"
    """`fusion`: the adaptations stay frozen, as in the paper's second stage. `all`: they train as well."""


class Split(CompositionSpec):
    """Each adaptation applies to its own span of the sequence."""

    kind: ClassVar[str] = "split"

    split: Items[str] = Field(json_schema_extra=_SEVERAL)
    """The adaptations; all at the same sites."""

    at: Items[Annotated[int, Field(ge=1)]]
    """Where one span ends and the next begins: positions in the sequence, counted from 0, one fewer than
    adaptations."""

    @model_validator(mode="after")
    def _spans_are_in_order(self) -> Self:
        if len(self.at) != len(self.split) - 1:
            spans = len(self.at) + 1
            refuse("at", f"{len(self.at)} positions make {spans} spans, but there are {len(self.split)} adaptations")
        if list(self.at) != sorted(set(self.at)):
            refuse("at", "positions must increase")
        return self


class Parallel(CompositionSpec):
    """Every row of a batch goes through every adaptation: a batch of size B becomes one of size n B, ordered by
    adaptation.
    """

    kind: ClassVar[str] = "parallel"

    parallel: Items[str] = Field(json_schema_extra=_SEVERAL)
    """The adaptations, identical except for their names."""


class Bank(CompositionSpec):
    """Adaptations of the same shape; each row of a batch, or each call, selects one of them or a mixture.

    A call may pass `adapter_ids`, one number (or name) for each row, or `adapter_weights`, `[rows, slots]`; without
    either, the active adaptation is used for all rows.
    """

    kind: ClassVar[str] = "bank"
    least: ClassVar[int] = 1

    bank: Items[str] = Field(json_schema_extra=_SOME)
    """The adaptations, in slot order; identical except for their names."""

    share: Items[str] = Field(default=(), json_schema_extra={"uniqueItems": True})
    """Parts that all slots have in common, by their printed names: `[norm_weight, norm_bias]`."""

    inputs: AdaptationName = "adapter"
    """Prefix of the names of the inputs."""

    slots: int | None = Field(default=None, ge=0, le=SIZE)
    """Empty slots beside those of the adaptations, for adapters that come and go while the model runs. The tensors of
    all slots are then stored as one, `[slots, ...]`, in the base's dtype, and do not train; an empty slot is zero. The
    adaptations must be `lora`; adapters of lower ranks fit as well. Default: no adapter can be added."""

    @model_validator(mode="after")
    def _slots_share_nothing(self) -> Self:
        if self.share and self.slots is not None:
            refuse("share", "adapters that come and go have all of their parts", hint="remove share, or slots")
        return self

    @property
    def size(self) -> int:
        """The number of its slots, empty ones included."""
        return len(self.bank) + (self.slots or 0)

    @property
    def ids(self) -> str:
        """The name of the input with a slot for each row, `int64[rows]`."""
        return f"{self.inputs}_ids"

    @property
    def mixture(self) -> str:
        """The name of the input with a weight for each row and slot, `[rows, slots]`, in the model's dtype."""
        return f"{self.inputs}_weights"


class Gate(CompositionSpec):
    """Multiplies the contribution of each adaptation by a gate between 0 and 1 for each row and layer.

    The gate is the mean over the row's tokens of `sigmoid(w x + b)`, where `x` is the adaptation's input (UniPELT, Mao
    et al. 2022). Every adaptation has its own gates at every site. The keys and values of a prefix are both multiplied
    by one gate, which reads the attention's input; when the gate is closed, they still take part in the softmax.
    """

    kind: ClassVar[str] = "gate"
    least: ClassVar[int] = 1

    gate: Items[str] = Field(json_schema_extra=_SOME)
    """The adaptations, each with its own gate."""

    tokens: Literal["real", "all"] = "real"
    """`real`: average over the tokens that the attention mask does not exclude. `all`: average over padding too, as in
    the paper's code, so a gate depends on the length of the padding."""


_KINDS: Mapping[str, type[CompositionSpec]] = {c.kind: c for c in (Stack, Average, Fuse, Split, Parallel, Bank, Gate)}


def composition_kinds() -> Mapping[str, type[CompositionSpec]]:
    """Return every kind of composition by its name."""
    return _KINDS


class _AnyComposition:
    """The union of all kinds, discriminated by the field with a kind's name."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_composition)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # Wrapped, because the handler would inline a bare model instead of putting it under ``$defs``.
        kinds = (c.__pydantic_core_schema__ for c in _KINDS.values())
        return {"oneOf": [handler(core_schema.definitions_schema(kind, [])) for kind in kinds]}


def _composition(value: Any) -> CompositionSpec:
    if isinstance(value, CompositionSpec):
        return value
    kinds = [key for key in value if key in _KINDS] if isinstance(value, Mapping) else []
    if len(kinds) != 1:
        message = f"a composition has one kind, not {' and '.join(kinds)}" if kinds else "a composition needs a kind"
        refuse((), message, hint=f"the kinds are: {', '.join(_KINDS)}")
    # The validator itself, not model_validate, so that pydantic keeps the paths of its errors.
    composition: CompositionSpec = _KINDS[kinds[0]].__pydantic_validator__.validate_python(dict(value))
    return composition


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, Mapping | CompositionSpec) else value


class _OneOrMore:
    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        written = handler(schema)
        return {"anyOf": [written["items"], written]}


Composition: TypeAlias = Annotated[CompositionSpec, _AnyComposition()]
Compositions: TypeAlias = Annotated[
    Annotated[Items[Composition], Field(max_length=ADAPTATIONS)], BeforeValidator(_as_list), _OneOrMore()
]
