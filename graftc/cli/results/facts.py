"""Results of ``graftc inspect`` about modules, tensors and nodes."""

from __future__ import annotations

from typing import Literal, TypeAlias

from pydantic import Field

from graftc.cli.results.base import Result
from graftc.specs.base_model import Items

__all__ = [
    "AdditionData",
    "BelowData",
    "ExplanationData",
    "Mode",
    "NodeFactData",
    "OriginData",
    "TensorFactData",
    "TreeData",
    "TreeTensorData",
    "ValueData",
]

Mode: TypeAlias = Literal["train", "eval"]
"""Which of the two graphs."""


class TreeTensorData(Result):
    """A tensor of a module, or one that an adaptation has there."""

    name: str
    """Within its module, or within the adaptation."""

    dtype: str
    """Its element type, such as `f32`."""

    shape: Items[int]
    """Its sizes."""

    trainable: bool
    """Whether it trains."""

    parameter: bool
    """Whether it is a parameter; a buffer otherwise."""

    tied: str | None
    """The name that owns it; null where this one does."""

    rows: str
    """The rows of the base tensor that it stands in for; empty for all of them."""


class AdditionData(Result):
    """What one adaptation has in a module."""

    adaptation: str
    """Its name."""

    method: str
    """Its method's tag."""

    tensors: Items[TreeTensorData]
    """Its tensors there; none where several places share them."""


class TreeData(Result):
    """A module, or several layers that are alike."""

    name: str
    """Its name below its parent; of the root, the class of the model."""

    paths: Items[str]
    """Its path, or those of the layers."""

    alike: int = Field(ge=1)
    """How many layers it stands for."""

    roles: Items[str]
    """Roles of what is adapted in the module itself."""

    base_parameters: int = Field(ge=0)
    """Elements of base parameters in it and below, in one of the layers."""

    trainable_parameters: int = Field(ge=0)
    """Elements that were added there and train, in one of the layers."""

    tensors: Items[TreeTensorData]
    """The module's own tensors of the base."""

    added: Items[AdditionData]
    """What adaptations have in the module itself."""

    children: Items[TreeData]
    """Modules below it."""


class OriginData(Result):
    """Why an adaptation is at a place."""

    adaptation: str
    """Its name; the `train:` list is `trained`, new tokens are `tokens`."""

    method: str
    """Its method's tag."""

    step: str
    """The step that inserted it."""

    site: str
    """The place; empty for what all places of the adaptation share."""

    module: str
    """Path of its module."""

    kind: str
    """What kind of site it is."""

    roles: Items[str]
    """What it does in the architecture, most specific first."""

    evidence: str
    """Why it has its role; empty where a target named it by path."""

    layer: int | None = Field(ge=0)
    """Index of its layer; null outside the layers."""

    stack: str
    """Path of the list of layers; empty outside the layers."""

    rows: str
    """The rows of the weight that are its own; empty for all of them."""

    selected_by: Items[str]
    """What of the target matches it."""

    file: str | None
    """The spec's file, where it was one."""

    line: int | None = Field(ge=1)
    """The line in it."""

    column: int | None = Field(ge=1)
    """The column in it."""

    path: str
    """The place in the spec, such as `adapt[0].target.role`."""

    source: str | None
    """The text of that line."""

    tensors: Items[str]
    """Names of the adaptation's tensors there."""


class ValueData(Result):
    """A value that is read, or what reads one."""

    name: str
    """As printed."""

    adaptation: str
    """The adaptation that inserted it; empty for the base's own."""


class NodeFactData(Result):
    """A node, and what is around it."""

    name: str
    """As printed."""

    node: str
    """Its name in the fx graph."""

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    """What kind of node it is there."""

    text: str
    """Its printed line."""

    module: str
    """Path of the module that it belongs to."""

    step: str
    """What made it: `capture`, or the step that inserted it."""

    inserted: bool
    """Whether an adaptation inserted it."""

    adaptation: str
    """Which one; empty for the base's own."""

    method: str
    """That one's method."""

    part: str
    """As what it was inserted."""

    reads: Items[ValueData]
    """The values that it reads."""

    read_by: Items[ValueData]
    """What reads it."""


class TensorFactData(Result):
    """A tensor."""

    name: str
    """As printed."""

    tensor: str
    """Its whole name."""

    type: str
    """Its type, such as `f32[4, 48]`."""

    trainable: bool
    """Whether it trains."""

    aliases: Items[str]
    """Other names of a tied tensor."""

    copies: Items[str]
    """Printed names of trained copies that stand in for it, or for rows of it."""


class BelowData(Result):
    """What modules below a place have."""

    nodes: int = Field(ge=0)
    """How many nodes."""

    inserted: int = Field(ge=0)
    """How many of those were inserted."""


class ExplanationData(Result):
    """Why something is in the graph."""

    name: str
    """What was asked for."""

    kind: Literal["value", "tensor", "place"]
    """What it turned out to be."""

    mode: Mode
    """Which graph."""

    title: str
    """The printed line of a value, the name and type of a tensor, the path of a place."""

    origins: Items[OriginData]
    """The adaptations behind it; for what is the base's own, those at its place."""

    nodes: Items[NodeFactData]
    """The value itself, the nodes that read a tensor, or the nodes of a place."""

    tensors: Items[TensorFactData]
    """What a value reads, the tensor itself, or the tensors of a place."""

    others: Items[str]
    """Other values of the same name, but for their number."""

    below: BelowData
    """For a place, what modules below it have."""
