"""The reasons why something is in a graph."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge

from graftc.records.fields import (
    INSERTED_AS,
    INSERTED_BY,
    KIND,
    GraphMode,
    InsertedFor,
    MethodTag,
    Module,
    PrintedLine,
    PrintedName,
    Stack,
    Trainable,
)
from graftc.specs.errors.diagnostics import Place
from graftc.specs.records.record import Record, stated


@dataclass(frozen=True)
class Origin(Record):
    """Why an adaptation is at a place."""

    adaptation: str
    """Its name; the `train:` list is `trained`, new tokens are `tokens`."""

    method: MethodTag

    step: str
    """The step that inserted it."""

    site: str
    """The place; empty for what all places of the adaptation share."""

    module: str
    """Path of its module."""

    kind: Annotated[str, KIND]

    roles: tuple[str, ...]
    """Its roles in the architecture, most specific first."""

    evidence: str
    """Why it has its role; empty where a target named it by path."""

    layer: Annotated[int | None, Ge(0)]
    """Index of its layer; null outside the layers."""

    stack: Stack

    rows: str
    """The rows of the weight that are its own; empty for all of them."""

    selected_by: tuple[str, ...]
    """The parts of the target that match it."""

    file: str | None
    """The spec's file, where it was one."""

    line: Annotated[int | None, Ge(1)]
    """The line in it."""

    column: Annotated[int | None, Ge(1)]
    """The column in it."""

    path: str
    """The place in the spec, such as `adapt[0].target.role`."""

    source: str | None
    """The text of that line."""

    tensors: tuple[str, ...]
    """Names of the adaptation's tensors there."""

    @property
    def place(self) -> Place:
        """The place in the spec that says so."""
        return Place(self.file, self.line, self.column, self.path, self.source)


@dataclass(frozen=True)
class ValueFact(Record, published="ValueData"):
    """A value that is read, or what reads one."""

    name: PrintedName

    adaptation: InsertedFor

    def __str__(self) -> str:
        return f"{self.name}  + {self.adaptation}" if self.adaptation else self.name


@dataclass(frozen=True)
class NodeFact(Record, behind={"step": ("inserted",)}):
    """A node, and what is around it."""

    name: PrintedName

    node: str
    """Its name in the fx graph."""

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    """The kind of node there."""

    text: PrintedLine

    module: Module

    step: str
    """The step that created it: `capture`, or the step that inserted it."""

    adaptation: InsertedFor

    method: Annotated[str, INSERTED_BY]

    part: Annotated[str, INSERTED_AS]

    reads: tuple[ValueFact, ...]
    """The values that it reads."""

    read_by: tuple[ValueFact, ...]
    """The values that read it."""

    @stated
    def inserted(self) -> bool:
        """Whether an adaptation inserted it."""
        return bool(self.adaptation)


@dataclass(frozen=True)
class TensorFact(Record):
    """A tensor."""

    name: PrintedName

    tensor: str
    """Its whole name."""

    type: str
    """Its type, such as `f32[4, 48]`."""

    trainable: Trainable

    aliases: tuple[str, ...]
    """Other names of a tied tensor."""

    copies: tuple[str, ...]
    """Printed names of trained copies that stand in for it, or for rows of it."""


@dataclass(frozen=True)
class Below(Record):
    """Counts of the nodes in modules below a place."""

    nodes: Annotated[int, Ge(0)]
    """How many nodes."""

    inserted: Annotated[int, Ge(0)]
    """How many of those were inserted."""


NOTHING_BELOW = Below(0, 0)


@dataclass(frozen=True)
class Explanation(Record):
    """Why something is in the graph."""

    name: str
    """The name that was asked for."""

    kind: Literal["value", "tensor", "place"]
    """The kind of thing that has the name."""

    mode: GraphMode

    title: str
    """The printed line of a value, the name and type of a tensor, the path of a place."""

    origins: tuple[Origin, ...]
    """The adaptations behind it; for what is the base's own, those at its place."""

    nodes: tuple[NodeFact, ...]
    """The value itself, the nodes that read a tensor, or the nodes of a place."""

    tensors: tuple[TensorFact, ...]
    """The tensors that a value reads, the tensor itself, or the tensors of a place."""

    others: tuple[str, ...] = ()
    """Other values of the same name, but for their number."""

    below: Below = NOTHING_BELOW
    """For a place, what modules below it have."""

    def text(self) -> str:
        """Return the explanation as text for users."""
        return "\n".join([self.title, *_body(self)]) + "\n"

    def __str__(self) -> str:
        return self.text()


_SHOWN = 8
_BASE = {"placeholder": "an input of the model", "output": "what the model returns"}


def _body(e: Explanation) -> Iterable[str]:
    if e.kind == "value":
        yield from _value_lines(e)
    elif e.kind == "tensor":
        yield from _tensor_lines(e)
    else:
        yield from _place_lines(e)


def _value_lines(e: Explanation) -> Iterable[str]:
    (node,) = e.nodes
    if node.adaptation:
        part = f", its part '{node.part}'" if node.part else ""
        yield f"  inserted by {_who(e.origins[0])}{part}, in the step {node.step}"
    else:
        yield f"  {_BASE.get(node.op, 'a node of the base')}, there since the capture"
    yield _fact("module", node.module or "(root)")
    yield _fact("fx node", node.node)
    if node.adaptation:
        yield from _origin_lines(e.origins[0], "  ")
    else:
        yield from _adapted_lines(e)
    yield from _listed("tensors", map(_tensor_text, e.tensors))
    yield from _listed("reads", map(str, node.reads))
    yield from _listed("read by", map(str, node.read_by))
    if e.others:
        more = f" and {len(e.others) - _SHOWN} more" if len(e.others) > _SHOWN else ""
        yield _fact("also", ", ".join(e.others[:_SHOWN]) + more)


def _tensor_lines(e: Explanation) -> Iterable[str]:
    (tensor,) = e.tensors
    owner = next((o for o in e.origins if tensor.tensor in o.tensors), None)
    whose = "of the base" if "@base." in tensor.name else "added by " + (_who(owner) if owner else "graftc")
    yield f"  a tensor {whose}; it {'trains' if tensor.trainable else 'does not train'}"
    yield _fact("Store name", tensor.tensor)
    yield from _listed("tied to", tensor.aliases)
    yield from _listed("trains as", tensor.copies)
    yield from _adapted_lines(e)
    readers = [str(ValueFact(node.name, node.adaptation)) for node in e.nodes]
    yield from _listed("read by", readers or [f"nothing in the {e.mode} graph"])


def _place_lines(e: Explanation) -> Iterable[str]:
    if not e.origins:
        yield "  not adapted"
    yield from _adapted_lines(e)
    yield from _listed("tensors", map(_tensor_text, e.tensors))
    if e.nodes:
        yield f"  nodes in the {e.mode} graph"
        yield from (f"    {node.text}" for node in e.nodes)
    if e.below.nodes:
        yield f"  {e.below.nodes} nodes in modules below, {e.below.inserted} of them inserted"


def _adapted_lines(e: Explanation) -> Iterable[str]:
    """Yield the adaptations at a place, one line each if there are more than two."""
    for origin in e.origins:
        if len(e.origins) > 2:
            roles = f", {origin.roles[0]}" if origin.roles else ""
            yield _fact("adapted by", f"{_who(origin)} at {origin.site}{roles}, {_spot(origin)}")
        else:
            yield f"  adapted by {_who(origin)}, in the step {origin.step}"
            yield from _origin_lines(origin, "    ")


def _origin_lines(origin: Origin, indent: str) -> Iterable[str]:
    if origin.site:
        where = f", layer {origin.layer} of {origin.stack}" if origin.layer is not None else ""
        rows = f", rows {origin.rows}" if origin.rows else ""
        yield _fact("place", f"{origin.site} ({origin.kind}{rows}{where})", indent)
    if origin.roles:
        yield _fact("role", ", ".join(origin.roles), indent)
    if origin.evidence:
        yield _fact("evidence", origin.evidence, indent)
    if origin.selected_by:
        yield _fact("selected by", "; ".join(origin.selected_by), indent)
    yield _fact("spec", str(origin.place), indent)
    if origin.place.text is not None:
        yield f"{indent}{'':<13}| {origin.place.text.strip()}"


def _spot(origin: Origin) -> str:
    place = origin.place
    return f"{place.file}:{place.line}" if place.file is not None and place.line is not None else str(place)


def _who(origin: Origin) -> str:
    named = origin.adaptation == origin.method
    return origin.adaptation if named else f"{origin.adaptation} ({origin.method})"


def _tensor_text(tensor: TensorFact) -> str:
    copies = f"  trains as {', '.join(tensor.copies)}" if tensor.copies else ""
    return f"{tensor.name}  {tensor.type}" + ("  trains" if tensor.trainable else copies)


def _fact(label: str, text: str, indent: str = "  ") -> str:
    return f"{indent}{label:<12} {text}"


def _listed(label: str, items: Iterable[str]) -> Iterable[str]:
    lines = list(items)
    for index, line in enumerate(lines[:_SHOWN]):
        yield _fact("" if index else label, line)
    if len(lines) > _SHOWN:
        yield _fact("", f"and {len(lines) - _SHOWN} more")
