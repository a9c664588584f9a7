"""Result of ``graftc inspect``: views of a rewritten graph."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from graftc.cli.results.base import DiagnosticData, PassData, Result
from graftc.cli.results.facts import ExplanationData, Mode, TreeData
from graftc.specs.base_model import Items

__all__ = [
    "AdaptationSummaryData",
    "ChangeData",
    "EdgeData",
    "GraphData",
    "GraphDiffData",
    "GraphNodeData",
    "InspectResult",
    "StepData",
    "SummaryData",
]


class AdaptationSummaryData(Result):
    """One adaptation."""

    name: str
    """Its name."""

    method: str
    """Its method's tag; `full` for the `train:` list, `tokens` for new tokens."""

    places: int = Field(ge=0)
    """How many places it adapts; of what trains in full, how many base tensors."""

    roles: Items[str]
    """The roles of its places."""

    layers: str
    """The layers that they are in, as text."""

    trainable_parameters: int = Field(ge=0)
    """Elements that it adds and that train."""

    frozen_parameters: int = Field(ge=0)
    """Elements that it adds and that do not train."""

    tensors: int = Field(ge=0)
    """How many tensors it adds."""

    nodes: int = Field(ge=0)
    """How many nodes of the eval graph it inserted."""


class SummaryData(Result):
    """What is adapted, and how much trains."""

    model: str
    """Class of the source model."""

    adaptations: Items[AdaptationSummaryData]
    """New tokens first, the `train:` list last."""

    base_parameters: int = Field(ge=0)
    """Elements of the base's parameters, tied ones once."""

    base_tensors: int = Field(ge=0)
    """How many tensors the base has, tied ones once."""

    trainable_parameters: int = Field(ge=0)
    """Elements that train in all adaptations, without the `train:` list."""

    trained_in_full: int = Field(ge=0)
    """Elements of the `train:` list."""

    percent: float = Field(ge=0, le=100)
    """`trainable_parameters` as a percentage of base plus trainable parameters."""

    nodes: int = Field(ge=0)
    """How many nodes the eval graph has, without reads of tensors."""

    inserted: int = Field(ge=0)
    """How many of them were inserted."""

    passes: Items[PassData]
    """Passes of plugins that the graphs went through, with the figures that they report."""


class GraphNodeData(Result):
    """A node, or a tensor that nodes read."""

    name: str
    """As printed."""

    order: int = Field(ge=0)
    """Its position in the graph."""

    op: Literal["placeholder", "get_attr", "call_function", "output"]
    """What kind of node it is; `get_attr` is a tensor."""

    target: str
    """The operator, or the name of the input or tensor."""

    type: str
    """Type of its value, such as `f32[s0, s1, 48]`."""

    module: str
    """Path of the module that it belongs to."""

    text: str
    """Its printed line."""

    adaptation: str | None
    """The adaptation that inserted it; null for the base's own."""

    method: str | None
    """That one's method."""

    site: str | None
    """The place that it was inserted for."""

    part: str | None
    """As what it was inserted."""


class EdgeData(Result):
    """A value that a node reads."""

    source: str
    """Name of what is read."""

    target: str
    """Name of what reads it."""

    position: str
    """Index of the argument, or its keyword, with the index in a list after a dot."""


class GraphData(Result):
    """The rewritten graph."""

    text: str
    """Its canonical text."""

    nodes: Items[GraphNodeData]
    """Nodes and tensors, in graph order."""

    edges: Items[EdgeData]
    """One for every time that a value is read."""


class ChangeData(Result):
    """One change, and the layers that it was made in."""

    layers: Items[str]
    """Paths of the layers; an empty path is what stands outside of them."""

    added: int = Field(ge=0)
    """Nodes added in each of the layers."""

    removed: int = Field(ge=0)
    """Nodes removed in each of the layers."""

    changed: int = Field(ge=0)
    """Nodes in each of the layers that have other arguments."""

    lines: Items[str]
    """A unified diff of canonical text, relative to the layer."""


class GraphDiffData(Result):
    """What changed from the base's graph to the rewritten one."""

    mode: Mode
    """Which graph."""

    added: int = Field(ge=0)
    """Nodes added in all layers."""

    removed: int = Field(ge=0)
    """Nodes removed in all layers."""

    changed: int = Field(ge=0)
    """Nodes with other arguments in all layers."""

    changes: Items[ChangeData]
    """The changes; layers that changed alike share one."""


class StepData(Result):
    """What one step did to the graph."""

    step: str
    """Its name."""

    added: int = Field(ge=0)
    """How many nodes it added."""

    removed: int = Field(ge=0)
    """How many nodes it removed."""

    nodes: int = Field(ge=0)
    """How many nodes there are after it."""

    inserted: int = Field(ge=0)
    """How many of them adaptations inserted."""

    verified: bool
    """Whether the verifier ran on its result."""

    seconds: float | None = Field(ge=0)
    """How long it took; null where that is not known."""


class OutcomeData(Result):
    """What a step of lowering found at a site of the training graph."""

    step: str
    """Its name, as in `optimise.off`."""

    place: str
    """The site."""

    done: bool
    """Whether it is computed otherwise."""

    reason: str
    """Why not; empty where it is."""


class InspectResult(Result):
    """`graftc inspect DIR --json`. What was not asked for is null."""

    artifact: str
    """The artifact's folder."""

    mode: Mode
    """Which of the two graphs."""

    summary: SummaryData
    """What is adapted, and how much trains."""

    graph: GraphData | None
    """With `--graph`: the rewritten graph."""

    diff: GraphDiffData | None
    """With `--diff`: what changed from the base's graph."""

    history: Items[StepData] | None
    """With `--history`: what every step did."""

    lowering: Items[OutcomeData] | None
    """With `--lowering`: what steps of lowering found in the training graph."""

    tree: TreeData | None
    """With `--tree`: the model's modules with what was added to them."""

    explanation: ExplanationData | None
    """With `--explain`: why something is there."""

    files: Items[str]
    """The files that were written."""

    warnings: Items[DiagnosticData]
    """Warnings."""
