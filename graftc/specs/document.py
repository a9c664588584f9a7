"""The document that a user writes: the adaptations, and the options that apply to all of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, count
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias, TypeVar

from pydantic import Field, GetCoreSchemaHandler, GetJsonSchemaHandler, field_validator, model_validator
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from graftc.specs.bare_entries import MISSING, bare_entries
from graftc.specs.base import Items, MethodSpec, NamedSpec, SpecModel, check_name
from graftc.specs.base_model import Document
from graftc.specs.compose import Bank, Compositions, CompositionSpec, Stack, composition_kinds
from graftc.specs.errors.diagnostics import GraftError, unknown_name
from graftc.specs.errors.markup import Html, escaped, table, tag
from graftc.specs.errors.text import quoted, shown
from graftc.specs.limits import ADAPTATIONS, SIZE, TOKENS
from graftc.specs.options.base import BaseOptions
from graftc.specs.options.cloze import ClozeOptions
from graftc.specs.options.memory import MemoryOptions
from graftc.specs.options.optimise import OptimiseOptions
from graftc.specs.patterns import PATTERNS, measure_braces, write_items
from graftc.specs.registry import method_spec, method_specs, unknown_method
from graftc.specs.spec_errors import CONCRETE, Problem, refuse, reject
from graftc.specs.target import PatternList

Named = TypeVar("Named", bound=NamedSpec)


class _AnyMethod:
    """The union of all methods, discriminated by ``method``; resolved late, so that plugins are included."""

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(_adaptation)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        # Wrapped, because the handler would inline a bare model instead of putting it under ``$defs``.
        options = {
            tag: handler(core_schema.definitions_schema(entry.spec_class.__pydantic_core_schema__, []))
            for tag, entry in method_specs().items()
        }
        mapping = {tag: option["$ref"] for tag, option in options.items()}
        # A spec class has its own tag as a default; in a document the tag is required.
        tagged = [{**option, "required": ["method"]} for option in options.values()]
        # The tags alone, beside the alternatives: editors offer them first, and report only an unknown tag.
        tag = {"enum": list(options), "description": "The method's tag; `graftc methods` lists them."}
        return {
            "type": "object",
            "required": ["method"],
            "properties": {"method": tag},
            "oneOf": tagged,
            "discriminator": {"propertyName": "method", "mapping": mapping},
        }


def _adaptation(value: Any) -> MethodSpec:
    if isinstance(value, MethodSpec):
        return value
    if not isinstance(value, Mapping):
        refuse((), f"an adaptation must be a mapping, not {shown(value)}")
    if "method" not in value:
        refuse((), "an adaptation needs a method", hint=f"the methods are: {', '.join(method_specs())}")
    tag = value["method"]
    entry = method_spec(tag) if isinstance(tag, str) else None
    if entry is None:
        refuse("method", unknown_method(tag))
    # The validator itself, not model_validate, so that pydantic keeps the paths of its errors.
    adaptation: MethodSpec = entry.spec_class.__pydantic_validator__.validate_python(dict(value))
    return adaptation


Adaptation: TypeAlias = Annotated[MethodSpec, _AnyMethod()]


def _method_class(data: Mapping[Any, Any]) -> type[MethodSpec]:
    entry = method_spec(str(data.get("method")))
    return MethodSpec if entry is None else entry.spec_class


def _composition_class(data: Mapping[Any, Any]) -> type[CompositionSpec]:
    return next((cls for kind, cls in composition_kinds().items() if kind in data), CompositionSpec)


CONCRETE[MethodSpec] = _method_class
CONCRETE[CompositionSpec] = _composition_class


class Tokens(SpecModel):
    """New tokens: trainable rows in the embedding table and in the head, which may be tied."""

    add: Items[str] = Field(
        max_length=TOKENS,
        json_schema_extra={"minItems": 1, "uniqueItems": True, "items": {"type": "string", "minLength": 1}},
    )
    """The tokens, in the order of their ids. Give the tokenizer the same ones, in the same order."""

    first: int | None = Field(default=None, ge=0)
    """Id of the first new token. Default: the first id after the end of the table. A smaller id uses spare rows of the
    table, as in tables padded to a round number."""

    @field_validator("add")
    @classmethod
    def _told_apart(cls, add: tuple[str, ...]) -> tuple[str, ...]:
        told: set[str] = set()
        for index, token in enumerate(add):
            if not token or token in told:
                what = f"the token {quoted(token)} is listed twice" if token else "a token is empty"
                refuse(index, what, hint="remove it")
            told.add(token)
        if not add:
            refuse((), "an empty list adds nothing; remove tokens")
        return add


class Budget(SpecModel):
    """How far folding may change the outputs."""

    logits: float | None = Field(default=None, ge=0)
    """Largest allowed absolute difference of logits in the deployment dtype. Default: by dtype."""


class FoldOptions(SpecModel):
    """Options for folding adaptations."""

    budget: Budget = Budget()
    """The budget that the certificate of a fold must not exceed."""


LayerRange: TypeAlias = Annotated[Items[Annotated[int, Field(ge=0, le=SIZE)]], Field(min_length=2, max_length=2)]
"""The first layer of a range, and the layer behind its last."""


class Spec(Document):
    """The changes to make to a model, as YAML, JSON, TOML or Python.

    Raises:
        GraftError: GC002 to GC012 with the path of the invalid value.
    """

    adapt: Items[Adaptation] = Field(max_length=ADAPTATIONS)
    """The adaptations, inserted in this order."""

    train: PatternList = ()
    """Globs of modules that train in full alongside the adaptations."""

    compose: Compositions = ()
    """How adaptations of the same sites are combined: one composition, or a list of them. By default they stack."""

    tokens: Tokens | None = None
    """Tokens to add, with trainable embeddings."""

    cloze: ClozeOptions | None = None
    """How a language model classifies by filling blanks. Absent: it stays a language model."""

    untie: PatternList = ()
    """Globs of modules that share a tensor with others and get their own copy of it, so that it can be folded."""

    layer_replication: Items[LayerRange] = Field(default=(), max_length=1024)
    """Ranges of layers, `[first, end]`, of which a deeper model consists, as in PEFT: `[[0, 4], [2, 6]]` has eight
    layers, of which two occur twice; at most 1,024. Copies share the base's tensors, and each has its own adapters.
    Absent: the model's own layers. To merge, list the copies in `untie`, as in `model.layers.{4,5}.**`."""

    capture: Literal["auto", "graph", "layers", "modules"] = "auto"
    """How much of the model has to be a graph: all of it (`graph`), at least each of its layers (`layers`), or single
    maps where a layer cannot be one (`modules`, as `auto` does). The rest runs as the model's own Python."""

    checkpoint: Literal["layers"] | None = None
    """`layers`: recompute each layer's activations in the backward pass instead of keeping them."""

    memory: MemoryOptions = MemoryOptions()
    """The values that a training step keeps in memory."""

    optimise: OptimiseOptions = OptimiseOptions()
    """How training graphs are lowered."""

    base: BaseOptions = BaseOptions()
    """How the base's weights are stored."""

    fold: FoldOptions = FoldOptions()
    """Constraints on folding."""

    MISSING: ClassVar[Mapping[str, str]] = MISSING

    @model_validator(mode="before")
    @classmethod
    def _is_a_whole_spec(cls, data: Any) -> Any:
        if (error := bare_entries(data)) is not None:
            refuse("adapt" if "adapt" in data else (), error)
        return data

    @field_validator("adapt")
    @classmethod
    def _names_are_unique(cls, adapt: tuple[MethodSpec, ...]) -> tuple[MethodSpec, ...]:
        own = [(index, a.name) for index, a in enumerate(adapt) if a.name is not None]
        first = {name: index for index, name in reversed(own)}
        taken_by = {index: f"the name '{name}' is taken by adapt[{first[name]}]" for index, name in own}
        repeated = [index for index, name in own if first[name] != index]
        reject(((index, "name"), GraftError("GC005", taken_by[index], hint="names are unique")) for index in repeated)
        taken = set(first)
        return tuple(named(a, a.method, taken) for a in adapt)

    @model_validator(mode="after")
    def _patterns_are_few(self) -> Self:
        size = sum(measure_braces(pattern)[1] for pattern in (*self.train, *self.untie))
        for index, adaptation in enumerate(self.adapt):
            size += adaptation.target.size + sum(override.size for override in adaptation.override_list())
            if size > PATTERNS:
                message = f"the patterns of the spec have more than {PATTERNS:,} characters with braces expanded"
                hint = "use '*' and '**', which match many names at once"
                refuse(("adapt", index, "target"), message, hint=hint, code="GC009")
        return self

    @model_validator(mode="after")
    def _compositions_fit(self) -> Self:
        if not self.compose:
            return self
        taken = {str(a.name) for a in self.adapt} | {str(c.name) for c in self.compose}
        compose = tuple(named(c, c.kind, taken) for c in self.compose)
        reject((("compose", *where), error) for where, error in self._misfits(compose))
        object.__setattr__(self, "compose", compose)
        return self

    def _misfits(self, compose: Sequence[CompositionSpec]) -> Iterator[Problem]:
        """Yield the errors of compositions, each with its path."""
        adaptations = dict.fromkeys(str(a.name) for a in self.adapt)
        stackable = adaptations | dict.fromkeys(str(c.name) for c in compose if not isinstance(c, Stack))
        kinds = {str(c.name): c.kind for c in compose}
        taken = set(adaptations)
        inputs: set[str] = set()
        member_of: dict[tuple[bool, str], str] = {}
        for index, own in enumerate(compose):
            name, stack = str(own.name), isinstance(own, Stack)
            if name in taken:
                yield (index, "name"), GraftError("GC005", f"the name '{name}' is taken", hint="names are unique")
            taken.add(name)
            known = stackable if stack else adaptations
            for position, member in enumerate(own.members):
                path = (index, own.kind, position)
                if member not in known:
                    kind = kinds.get(member)
                    error = _no_part(kind, member, stack) if kind else unknown_name("adaptation", member, known)
                    yield path, error
                other = member_of.setdefault((stack, member), name)
                if other != name:
                    message = f"{quoted(member)} is already in the composition '{other}'"
                    yield path, GraftError("GC036", message, hint="an adaptation can be in only one composition")
            if isinstance(own, Bank):
                if own.inputs in inputs:
                    hint = f"for example inputs: {name}"
                    error = GraftError("GC002", f"another bank already has the input '{own.ids}'", hint=hint)
                    yield (index, "inputs"), error
                inputs.add(own.inputs)

    @property
    def owners(self) -> dict[str, str]:
        """The method of each adaptation and the kind of each composition, by name."""
        composed = {str(c.name): c.kind for c in self.compose if not isinstance(c, Stack)}
        return {**{str(a.name): a.method for a in self.adapt}, **composed}

    def composition_of(self, name: str) -> CompositionSpec | None:
        """Return the composition that an adaptation is part of, ignoring stacks, which are the default."""
        return next((c for c in self.compose if name in c.members and not isinstance(c, Stack)), None)

    def _repr_html_(self) -> str:
        """Return HTML for notebooks: a table of the adaptations, and one of the other fields of the document."""
        rows = [(a.name or a.method, a.method, _fields(a.target), _fields(a, without=_SHOWN)) for a in self.adapt]
        given = self.model_fields_set - {"adapt", "version"}
        rest = [(f, _written(getattr(self, f))) for f in type(self).model_fields if f in given]
        caption = f"Spec with {len(rows)} {'adaptation' if len(rows) == 1 else 'adaptations'}"
        adaptations = table(("name", "method", "target", "settings"), rows)
        return Html(tag("b", caption) + adaptations + table(("field", "value"), rest))


_SHOWN = ("name", "method", "target")


def _fields(model: SpecModel, without: Sequence[str] = ()) -> Html:
    """Format the fields that a part of a document sets, one per line."""
    given = ((f, getattr(model, f)) for f in type(model).model_fields if f in model.model_fields_set - set(without))
    return Html("<br>".join(escaped(f"{name}: {_written(value)}", 300) for name, value in given))


def _written(value: object) -> str:
    """Format a value roughly as it would be written in a document."""
    return write_items(value) if isinstance(value, tuple) else shown(value, 300)


def named(entry: Named, word: str, taken: set[str]) -> Named:
    """Return an entry with its own name, or with the first free one of ``lora``, ``lora_2``, ``lora_3`` ...

    Args:
        entry: an adaptation or a composition.
        word: its method or its kind.
        taken: names of others; a free one is added.
    """
    if entry.name is not None:
        return entry
    names = chain([word], (f"{word}_{number}" for number in count(2)))
    free = next(name for name in names if name not in taken and check_name(name) is None)
    taken.add(free)
    return entry.model_copy(update={"name": free})


def _no_part(kind: str, member: str, stack: bool) -> GraftError:
    """Return the error for a composition that is a member of another one that does not accept it."""
    what = "a stack accepts adaptations, and compositions that are not stacks" if stack else "members are adaptations"
    return GraftError("GC036", f"{quoted(member)} is itself a composition: {kind}", hint=what)
