"""What was found in a graph: roles with their evidence, and what could not be told."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from graftc.compiler.columns import Runs
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
    """A weight or table without a role, and why it has none."""

    module: str
    reason: str

    def to_json(self) -> dict[str, str]:
        """Plain values."""
        return {"module": self.module, "reason": self.reason}


@dataclass(frozen=True)
class Sublayer:
    """A branch of the residual stream, as nodes.

    Attributes:
        role: ``attn.sublayer`` or ``ffn.sublayer``, with prefixes; both where attention and feed-forward run side
            by side in one branch.
        stream: what the branch is added to; ``branch``: what is added; ``sum``: the add.
    """

    roles: tuple[str, ...]
    stream: fx.Node
    branch: fx.Node
    sum: fx.Node
    module: str
    layer: int | None
    stack: str


@dataclass(frozen=True)
class Structure:
    """The architecture of one graph.

    Attributes:
        findings: roles, in graph order.
        unresolved: weights that fit no role, with the reason.
        sublayers: residual branches, in graph order.
    """

    findings: tuple[Finding, ...]
    unresolved: tuple[Unresolved, ...] = ()
    sublayers: tuple[Sublayer, ...] = field(default=(), repr=False)

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
        }

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """Lines of a table: role, place, rows, layers and evidence. Equal layers of a stack share a line."""
        grouped: dict[tuple[str, str, str], list[Finding]] = {}
        for f in self.findings:
            shape = "all" if f.rows is None else format_runs(f.rows)
            place = f.parameter or f.module
            if f.layer is not None:
                place = place.replace(f"{f.stack}.{f.layer}", f"{f.stack}.*", 1)
            grouped.setdefault((f.role, place, shape), []).append(f)
        lines = []
        for (role, place, shape), found in grouped.items():
            layers = format_layers(f.layer for f in found if f.layer is not None)
            lines.append((role, place, shape, layers, found[0].evidence))
        return lines


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
