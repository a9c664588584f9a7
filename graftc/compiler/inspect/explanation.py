"""The result of an explanation: facts about nodes, tensors and places, as data and as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

from graftc.compiler.inspect.origins import Origin
from graftc.passes.core.ir.program_key import Mode


@dataclass(frozen=True)
class TensorFact:
    """Facts about a tensor.

    Attributes:
        name: the printed name.
        tensor: its Store name.
        type: its type, such as ``"f32[4, 48]"``.
        trainable: whether it trains.
        aliases: other names of a tied tensor.
        copies: printed names of the trained copies that replace it, or rows of it.
    """

    name: str
    tensor: str
    type: str
    trainable: bool
    aliases: tuple[str, ...]
    copies: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fact as plain values."""
        return {
            "name": self.name,
            "tensor": self.tensor,
            "type": self.type,
            "trainable": self.trainable,
            "aliases": list(self.aliases),
            "copies": list(self.copies),
        }


@dataclass(frozen=True)
class ValueFact:
    """A value that is read, or the reader of one.

    Attributes:
        name: the printed name.
        adaptation: the adaptation that inserted it; empty for nodes of the base.
    """

    name: str
    adaptation: str

    def __str__(self) -> str:
        return f"{self.name}  + {self.adaptation}" if self.adaptation else self.name

    def to_json(self) -> dict[str, Any]:
        """Return the fact as plain values."""
        return {"name": self.name, "adaptation": self.adaptation}


@dataclass(frozen=True)
class NodeFact:
    """Facts about a node.

    Attributes:
        name: the printed name.
        node: its name in the fx graph.
        op: its kind in the fx graph.
        text: its printed line.
        module: path of the module that it belongs to.
        step: the step that created it: ``capture``, or the pass that inserted it.
        adaptation, method, part: the adaptation that inserted it, with its method and the part; empty for nodes of the
            base.
        reads, read_by: the values that it reads, and those that read it.
    """

    name: str
    node: str
    op: str
    text: str
    module: str
    step: str
    adaptation: str
    method: str
    part: str
    reads: tuple[ValueFact, ...]
    read_by: tuple[ValueFact, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the fact as plain values."""
        return {
            "name": self.name,
            "node": self.node,
            "op": self.op,
            "text": self.text,
            "module": self.module,
            "step": self.step,
            "inserted": bool(self.adaptation),
            "adaptation": self.adaptation,
            "method": self.method,
            "part": self.part,
            "reads": [value.to_json() for value in self.reads],
            "read_by": [value.to_json() for value in self.read_by],
        }


@dataclass(frozen=True)
class Explanation:
    """The reason why something is in a graph.

    Attributes:
        name: the requested name.
        kind: the kind of thing that the name refers to.
        mode: the mode of the graph.
        title: the printed line of a value, the name and type of a tensor, or the path of a place.
        origins: the adaptations behind it; for a node or tensor of the base, those at its place.
        nodes: the value itself, the nodes that read a tensor, or the nodes of a place.
        tensors: the tensors that a value reads, the tensor itself, or the tensors of a place.
        others: other values whose names differ only in their number.
        below: for a place, the number of nodes in modules below it, and how many of those were inserted.
    """

    name: str
    kind: Literal["value", "tensor", "place"]
    mode: Mode
    title: str
    origins: tuple[Origin, ...]
    nodes: tuple[NodeFact, ...]
    tensors: tuple[TensorFact, ...]
    others: tuple[str, ...] = ()
    below: tuple[int, int] = (0, 0)

    def to_json(self) -> dict[str, Any]:
        """Return the explanation as plain values."""
        return {
            "name": self.name,
            "kind": self.kind,
            "mode": self.mode,
            "title": self.title,
            "origins": [origin.to_json() for origin in self.origins],
            "nodes": [node.to_json() for node in self.nodes],
            "tensors": [tensor.to_json() for tensor in self.tensors],
            "others": list(self.others),
            "below": {"nodes": self.below[0], "inserted": self.below[1]},
        }

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
    if e.below[0]:
        yield f"  {e.below[0]} nodes in modules below, {e.below[1]} of them inserted"


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
