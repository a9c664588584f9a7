"""Results of the commands that list: methods and roles."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from graftc.cli.results.base import DiagnosticData, Result, Runs
from graftc.specs.base_model import Items
from graftc.specs.claims import FoldKind, SiteKind

__all__ = [
    "ClaimsData",
    "FindingData",
    "MethodData",
    "MethodPage",
    "MethodsResult",
    "RolesResult",
    "SublayerData",
    "UnresolvedData",
]

_Kind = Annotated[SiteKind, Field(strict=False)]


class ClaimsData(Result):
    """What a method claims about itself; the contract tests check it."""

    sites: Items[_Kind]
    """The kinds of site that it can adapt."""

    identity_at_init: bool
    """Whether the adapted model computes exactly what the base computes before training."""

    folds: Annotated[FoldKind, Field(strict=False)]
    """Whether and how it folds into base weights."""

    bankable: bool
    """Whether several adaptations of one shape can share a bank."""

    inert: Items[str]
    """Parts that legitimately get no gradient at first."""


class MethodData(Result):
    """One method."""

    tag: str
    """What a spec writes as `method`."""

    summary: str
    """One sentence."""

    paper: str
    """The papers to cite, separated by `; `; empty where there is none."""

    claims: ClaimsData
    """What it claims."""

    module: str
    """The module that defines its spec; a plugin's lies outside of graftc."""


class MethodsResult(Result):
    """`graftc methods --json`."""

    methods: Items[MethodData]
    """Every method, in the order of their tags."""


class MethodPage(MethodData):
    """`graftc methods NAME --json`."""

    description: str
    """The whole text about it."""

    json_schema: dict[str, Any] = Field(alias="schema")
    """JSON Schema of its adaptations."""


class FindingData(Result):
    """One role of one place."""

    role: str
    """The full role, with `encoder.`, `decoder.` and `cross.` where the model has two stacks."""

    kind: _Kind
    """What kind of site it is."""

    node: str
    """Name of the node in the captured graph."""

    module: str
    """Path of the module that owns it."""

    parameter: str | None
    """Name of the weight; null for attentions and for weights made of several parameters."""

    rows: Runs | None
    """The rows of the weight that are its own, as half-open runs; null is all of them."""

    layer: int | None = Field(ge=0)
    """Index of the layer; null outside the layers."""

    stack: str
    """Path of the list of layers; empty outside the layers."""

    use: int = Field(ge=0)
    """Which use of the weight in the module this is, for layers that run several times."""

    evidence: str
    """Why it has this role, for people."""


class UnresolvedData(Result):
    """A weight that no role could be told for."""

    module: str
    """Path of the module that owns it."""

    layer: int | None = Field(ge=0)
    """Index of the layer; null outside the layers."""

    stack: str
    """Path of the list of layers; empty outside the layers."""

    reason: str
    """Why, for people."""


class SublayerData(Result):
    """A branch of the residual stream, by names of nodes in the captured graph."""

    roles: Items[str]
    """`attn.sublayer`, `ffn.sublayer`, both or none, with prefixes."""

    stream: str
    """What the branch is added to."""

    normed: str
    """What the branch reads."""

    projection: str
    """Output of its last linear map, before dropout and norms."""

    branch: str
    """What is added."""

    sum: str
    """The add."""

    post_norm: str | None
    """The norm behind the sum; null where the stream goes on from the sum."""

    output: str
    """What the stream goes on from."""

    module: str
    """Path of the module that adds."""

    layer: int | None = Field(ge=0)
    """Index of the layer; null outside the layers."""

    stack: str
    """Path of the list of layers; empty outside the layers."""

    use: int = Field(ge=0)
    """Which sublayer of these roles in its layer this is."""


class RolesResult(Result):
    """`graftc roles MODEL --json`."""

    model: str
    """The MODEL argument."""

    class_name: str = Field(alias="class")
    """Name of the model's class."""

    findings: Items[FindingData]
    """Roles, in graph order."""

    unresolved: Items[UnresolvedData]
    """Weights without a role, with the reason."""

    sublayers: Items[SublayerData]
    """Branches of the residual stream, in graph order."""

    warnings: Items[DiagnosticData]
    """Warnings."""
