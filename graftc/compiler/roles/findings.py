"""What was found in a graph: roles with their evidence, and what could not be told."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from graftc.passes.core.sites.sites import AttentionOperands
from graftc.passes.core.weights.runs import Runs
from graftc.specs.claims import SiteKind
from graftc.specs.roles import widen


@dataclass(frozen=True)
class Finding:
    """One role of one node.

    Attributes:
        role: full role, with ``encoder.``, ``decoder.`` and ``cross.`` where the model has two stacks.
        kind: what kind of site it is.
        node: the node of the graph.
        module: path of the node's owning module.
        parameter: name of the weight, None for attentions and for weights made of several parameters.
        rows: the own output rows as sorted, disjoint, half-open runs; None is all of them.
        layer, stack: index of the layer and path of the list it is in; None and empty outside the layers.
        use: which use of the weight in the module this is, for layers that run several times.
        evidence: why, for people.
    """

    role: str
    kind: SiteKind
    node: fx.Node
    module: str
    parameter: str | None
    rows: Runs | None
    layer: int | None
    stack: str
    use: int
    evidence: str

    @property
    def roles(self) -> frozenset[str]:
        """The role under every subset of its prefixes."""
        return widen(self.role)

    def to_json(self) -> dict[str, Any]:
        """Plain values; the node by name."""
        return {
            "role": self.role,
            "kind": str(self.kind),
            "node": self.node.name,
            "module": self.module,
            "parameter": self.parameter,
            "rows": None if self.rows is None else [list(run) for run in self.rows],
            "layer": self.layer,
            "stack": self.stack,
            "use": self.use,
            "evidence": self.evidence,
        }


@dataclass(frozen=True)
class Unresolved:
    """A weight or table without a role, or an operand that no weight could be found for, and why.

    Attributes:
        module: path of the module that owns the node.
        reason: why, for people.
        layer, stack: index of the layer and path of the list it is in; None and empty outside the layers.
    """

    module: str
    reason: str
    layer: int | None = None
    stack: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"module": self.module, "layer": self.layer, "stack": self.stack, "reason": self.reason}


@dataclass(frozen=True)
class Sublayer:
    """A branch of the residual stream, as nodes.

    Attributes:
        roles: ``attn.sublayer`` or ``ffn.sublayer``, with prefixes; both where one projection ends an attention and
            a feed-forward together; none for other branches.
        stream: what the branch is added to.
        normed: what the branch reads: the norm's output, or the stream where no norm stands before.
        projection: output of the last linear map, before dropout and norms; where several meet, what joins them.
        branch: what is added.
        sum: the add. Parallel sublayers share it: it is the stream plus all their branches. Where the model weighs
            the operands in the same call (``lerp``, ``addcmul``), it is that call.
        post_norm: the norm behind the sum, where the stream goes on from that.
        module: path of the module that adds.
        layer, stack: index of the layer and path of the list it is in; None and empty outside the layers.
        use: which sublayer of these roles in its `owner` this is.
    """

    roles: tuple[str, ...]
    stream: fx.Node
    normed: fx.Node
    projection: fx.Node
    branch: fx.Node
    sum: fx.Node
    post_norm: fx.Node | None
    module: str
    layer: int | None
    stack: str
    use: int = 0

    @property
    def output(self) -> fx.Node:
        """What the stream goes on from."""
        return self.post_norm or self.sum

    @property
    def owner(self) -> str:
        """Path of the layer, or of the module that adds where there is none."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}"

    def to_json(self) -> dict[str, Any]:
        """Plain values; nodes by name."""
        parts = ("stream", "normed", "projection", "branch", "sum", "post_norm", "output")
        names = {part: getattr(getattr(self, part), "name", None) for part in parts}
        where = {"module": self.module, "layer": self.layer, "stack": self.stack, "use": self.use}
        return {"roles": list(self.roles), **names, **where}


@dataclass(frozen=True, eq=False)
class Heads:
    """What the keys and values of an attention are made of, head by head.

    Attributes:
        keys, values: ``int64[heads, width]``: the columns of what is projected, numbered from 0 in their own order, so
            that heads that share keys name the same columns.
        operands: the values that hold them.
    """

    keys: Tensor
    values: Tensor
    operands: AttentionOperands


@dataclass(frozen=True)
class Structure:
    """The architecture of one graph.

    Attributes:
        findings: roles, in graph order.
        unresolved: weights that fit no role, with the reason.
        sublayers: residual branches, in graph order.
        heads: attentions whose keys and values can be followed head by head.
    """

    findings: tuple[Finding, ...]
    unresolved: tuple[Unresolved, ...] = ()
    sublayers: tuple[Sublayer, ...] = field(default=(), repr=False)
    heads: Mapping[fx.Node, Heads] = field(default_factory=dict, repr=False)

    def by_role(self) -> dict[str, list[Finding]]:
        """Full role to its findings, in graph order."""
        found: dict[str, list[Finding]] = {}
        for finding in self.findings:
            found.setdefault(finding.role, []).append(finding)
        return found

    def having(self, role: str) -> list[Finding]:
        """Findings that answer to ``role``: ``attn.k`` finds ``decoder.cross.attn.k`` too."""
        return [f for f in self.findings if role in f.roles]

    def to_json(self) -> dict[str, Any]:
        """Plain values for ``graftc roles --json``."""
        return {
            "findings": [f.to_json() for f in self.findings],
            "unresolved": [u.to_json() for u in self.unresolved],
            "sublayers": [s.to_json() for s in self.sublayers],
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Lines of a table: role, place, rows, layers and evidence. Equal layers of a stack share a line."""
        grouped: dict[tuple[str, str, str], list[Finding]] = {}
        for f in self.findings:
            shape = "all" if f.rows is None else format_runs(f.rows)
            grouped.setdefault((f.role, _starred(f.parameter or f.module, f), shape), []).append(f)
        lines = []
        for (role, place, shape), found in grouped.items():
            layers = format_layers(f.layer for f in found if f.layer is not None)
            lines.append((role, place, shape, layers, found[0].evidence))
        return lines

    def unresolved_rows(self) -> list[tuple[str, str, str]]:
        """Lines of a table: module, layers and reason. Equal layers of a stack share a line, with the first reason."""
        grouped: dict[tuple[str, str], list[Unresolved]] = {}
        for u in self.unresolved:
            grouped.setdefault((_starred(u.module, u), _NUMBER.sub("#", u.reason)), []).append(u)
        return [
            (module, format_layers(u.layer for u in found if u.layer is not None), found[0].reason)
            for (module, _), found in grouped.items()
        ]


_NUMBER = re.compile(r"\d+")


def _starred(path: str, found: Finding | Unresolved) -> str:
    """A path with a star for the layer."""
    if found.layer is None:
        return path
    return path.replace(f"{found.stack}.{found.layer}", f"{found.stack}.*", 1)


def format_runs(runs: Runs, limit: int = 4) -> str:
    """Runs as text: ``0:48,96:144``; beyond ``limit`` runs, the first ones and how many there are."""
    text = ",".join(f"{a}:{b}" for a, b in runs[:limit])
    return text if len(runs) <= limit else f"{text},... ({len(runs)} runs)"


def format_layers(layers: Iterable[int]) -> str:
    """Layer numbers as text: ``0-11``, ``0,2,4``."""
    numbers = sorted(set(layers))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def place(module: str) -> tuple[int | None, str]:
    """Layer and stack from a module path: the first number in it, and the path before that."""
    segments = module.split(".")
    for index, segment in enumerate(segments):
        if segment.isdigit():
            return int(segment), ".".join(segments[:index])
    return None, ""
