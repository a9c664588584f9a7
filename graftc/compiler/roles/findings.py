"""Results of the analysis of a graph: roles with their evidence, and what could not be resolved."""

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
        role: the full role, with ``encoder.``, ``decoder.`` and ``cross.`` if the model has two stacks.
        kind: the kind of site.
        node: the node of the graph.
        module: path of the node's owning module.
        parameter: name of the weight; None for attentions and for weights computed from several parameters.
        rows: its own output rows as sorted, disjoint, half-open runs; None for all of them.
        layer, stack: index of the layer and path of the list that contains it; None and empty outside the layers.
        use: index of this use among those of the weight in the module, for layers that run several times.
        evidence: the reason, as text for users.
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
        """The role with every subset of its prefixes."""
        return widen(self.role)

    def to_json(self) -> dict[str, Any]:
        """Return the finding as plain values, with the node by name."""
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
    """A weight or table without a role, or an operand for which no weight was found, with the reason.

    Attributes:
        module: path of the module that owns the node.
        reason: the reason, as text for users.
        layer, stack: index of the layer and path of the list that contains it; None and empty outside the layers.
    """

    module: str
    reason: str
    layer: int | None = None
    stack: str = ""

    def to_json(self) -> dict[str, Any]:
        """Return the entry as plain values."""
        return {"module": self.module, "layer": self.layer, "stack": self.stack, "reason": self.reason}


@dataclass(frozen=True)
class Sublayer:
    """A branch of the residual stream, described by nodes.

    Attributes:
        roles: ``attn.sublayer`` or ``ffn.sublayer``, with prefixes; both if one projection ends an attention and a
            feed-forward together; none for other branches.
        stream: the value that the branch is added to.
        normed: the value that the branch reads: the norm's output, or the stream if there is no norm before the branch.
        projection: output of the last linear map, before dropout and norms; if several meet, the node that joins them.
        branch: the value that is added.
        sum: the add. Parallel sublayers share it: it is the stream plus all their branches. If the model weights the
            operands in the same call (``lerp``, ``addcmul``), it is that call.
        post_norm: the norm after the sum, if the stream continues from that norm.
        module: path of the module that adds.
        layer, stack: index of the layer and path of the list that contains it; None and empty outside the layers.
        use: index of this sublayer among those with the same roles in its `owner`.
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
        """The value that the stream continues from."""
        return self.post_norm or self.sum

    @property
    def owner(self) -> str:
        """The path of the layer, or of the module that adds if there is no layer."""
        return self.module if self.layer is None else f"{self.stack}.{self.layer}"

    def to_json(self) -> dict[str, Any]:
        """Return the sublayer as plain values, with nodes by name."""
        parts = ("stream", "normed", "projection", "branch", "sum", "post_norm", "output")
        names = {part: getattr(getattr(self, part), "name", None) for part in parts}
        where = {"module": self.module, "layer": self.layer, "stack": self.stack, "use": self.use}
        return {"roles": list(self.roles), **names, **where}


@dataclass(frozen=True, eq=False)
class Heads:
    """The columns that the keys and values of an attention consist of, head by head.

    Attributes:
        keys, values: ``int64[heads, width]``: the columns of the projected values, numbered from 0 in their own order,
            so that heads that share keys have the same column numbers.
        operands: the values that contain them.
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
        """Return the findings by full role, in graph order."""
        findings: dict[str, list[Finding]] = {}
        for finding in self.findings:
            findings.setdefault(finding.role, []).append(finding)
        return findings

    def having(self, role: str) -> list[Finding]:
        """Return the findings that match ``role``: ``attn.k`` also matches ``decoder.cross.attn.k``."""
        return [f for f in self.findings if role in f.roles]

    def to_json(self) -> dict[str, Any]:
        """Return plain values for ``graftc roles --json``."""
        return {
            "findings": [f.to_json() for f in self.findings],
            "unresolved": [u.to_json() for u in self.unresolved],
            "sublayers": [s.to_json() for s in self.sublayers],
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return table lines of role, place, rows, layers and evidence; equal layers of a stack share a line."""
        grouped: dict[tuple[str, str, str], list[Finding]] = {}
        for f in self.findings:
            shape = "all" if f.rows is None else format_runs(f.rows)
            grouped.setdefault((f.role, _starred(f.parameter or f.module, f), shape), []).append(f)
        lines = []
        for (role, place, shape), findings in grouped.items():
            layers = format_layers(f.layer for f in findings if f.layer is not None)
            lines.append((role, place, shape, layers, findings[0].evidence))
        return lines

    def unresolved_rows(self) -> list[tuple[str, str, str]]:
        """Return table lines of module, layers and reason.

        Equal layers of a stack share a line, with the first reason.
        """
        grouped: dict[tuple[str, str], list[Unresolved]] = {}
        for u in self.unresolved:
            grouped.setdefault((_starred(u.module, u), _NUMBER.sub("#", u.reason)), []).append(u)
        return [
            (module, format_layers(u.layer for u in entries if u.layer is not None), entries[0].reason)
            for (module, _), entries in grouped.items()
        ]


_NUMBER = re.compile(r"\d+")


def _starred(path: str, finding: Finding | Unresolved) -> str:
    """Return the path with the layer number replaced by a star."""
    if finding.layer is None:
        return path
    return path.replace(f"{finding.stack}.{finding.layer}", f"{finding.stack}.*", 1)


def format_runs(runs: Runs, limit: int = 4) -> str:
    """Return runs as text, ``0:48,96:144``; if there are more than ``limit``, the first ones and the total number."""
    text = ",".join(f"{a}:{b}" for a, b in runs[:limit])
    return text if len(runs) <= limit else f"{text},... ({len(runs)} runs)"


def format_layers(layers: Iterable[int]) -> str:
    """Return layer numbers as text: ``0-11``, ``0,2,4``."""
    numbers = sorted(set(layers))
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][1] == number - 1:
            spans[-1][1] = number
        else:
            spans.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def place(module: str) -> tuple[int | None, str]:
    """Return the layer and stack of a module path: the first number in it, and the path before that number."""
    segments = module.split(".")
    for index, segment in enumerate(segments):
        if segment.isdigit():
            return int(segment), ".".join(segments[:index])
    return None, ""
