"""`Labels`: collects findings, the roles assigned so far, each node's stack, and the parts without a role."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

import torch
from torch import Tensor, fx

from graftc.compiler.roles.columns import Columns, Through
from graftc.compiler.roles.computed_weights import parameter_rows
from graftc.compiler.roles.findings import Heads, Structure, place
from graftc.compiler.roles.flow import Attention, Flow, bits
from graftc.compiler.roles.maps import Linear
from graftc.passes.core.weights.runs import Runs, runs_of
from graftc.passes.core.worklist import Worklist
from graftc.records.roles import Finding, Sublayer, Unresolved
from graftc.specs.claims import SiteKind
from graftc.specs.errors.text import format_runs


class Labels:
    """The findings of a graph while they are being collected.

    Attributes:
        flow, columns: the facts from which findings are derived.
        roles: the roles assigned to each source node so far, with their columns (None for all columns).
        stream: the numbers of the sources that residual streams start from or pass through.
        encoder_only: whether the graph contains only an encoder.
        encoder: in a graph with cross-attention, the encoder's nodes as a bit set of positions.
        crosses: the attention calls whose keys and queries come from different streams.
        mixing: the nodes that mix positions without attention, as a bit set; None until requested.
    """

    def __init__(self, flow: Flow, columns: Columns, *, encoder: bool = False) -> None:
        self.flow, self.columns, self.encoder_only = flow, columns, encoder
        self.findings: list[Finding] = []
        self.unresolved: dict[fx.Node, Unresolved] = {}
        self.roles: dict[fx.Node, dict[str, Tensor | None]] = defaultdict(dict)
        self.encoder = 0
        self.crosses: set[fx.Node] = set()
        self.mixing: int | None = None
        self.stream = self._stream()
        self._mapped = cache(partial(parameter_rows, flow))

    # --- queries ---------------------------------------------------------------------------------------

    def nearest(self, node: fx.Node) -> list[fx.Node]:
        """Return the nearest sources above ``node``, in graph order."""
        return [self.columns.sources[i] for i in bits(self.columns.front.get(node, 0))]

    def nearest_linears(self, node: fx.Node) -> list[fx.Node]:
        """Return the linear maps among the nearest sources."""
        return [n for n in self.nearest(node) if n in self.flow.linears]

    def linear_columns(self, node: fx.Node) -> dict[fx.Node, Tensor]:
        """Return the linear maps whose columns ``node`` contains, each with these columns."""
        columns = {self.columns.sources[i]: c for i, c in self.columns.columns(node).items()}
        return {n: c for n, c in columns.items() if n in self.flow.linears}

    def has_role(self, node: fx.Node, columns: Tensor | None = None) -> bool:
        """Return whether any of a source's given columns (by default all) has a role."""
        roles = self.roles.get(node, {})
        if columns is None:
            return bool(roles)
        return any(own is None or bool(torch.isin(columns, own).any()) for own in roles.values())

    def _stream(self) -> set[int]:
        """Return the sources that residual streams start from or pass through, looking behind linear maps as well."""
        front = self.columns.front
        numbers = Worklist(n for r in self.flow.residuals.values() for n in bits(front.get(r.stream, 0)))
        for number in numbers:
            linear = self.flow.linears.get(self.columns.sources[number])
            if linear is not None:
                numbers += bits(front.get(linear.input, 0))
        return numbers.visited

    def in_stream(self, node: fx.Node) -> bool:
        """Return whether a source is part of a residual stream or of the values that a stream starts from."""
        return self.columns.number.get(node, -1) in self.stream

    def inside(self, base: fx.Node, branch: fx.Node) -> list[fx.Node]:
        """Return the linear maps, convolutions and attention calls from ``base`` to ``branch``, in graph order."""
        return self.flow.between(base, branch, self.flow.working)

    def between(self, base: fx.Node, node: fx.Node, branch: fx.Node) -> bool:
        """Return whether ``node`` lies on a path from ``base`` to ``branch``."""
        return self.flow.is_above(base, node) and (node is branch or self.flow.is_above(node, branch))

    # --- recording -------------------------------------------------------------------------------------

    def prefix(self, node: fx.Node, attention: fx.Node | None = None) -> str:
        """Return ``encoder.``, ``decoder.`` or ``decoder.cross.`` for a model with two stacks, otherwise empty."""
        if self.encoder_only:
            return "encoder."
        if not self.crosses:
            return ""
        if attention is not None and attention in self.crosses:
            return "decoder.cross."
        return "encoder." if self.encoder >> self.flow.at[node] & 1 else "decoder."

    def module(self, node: fx.Node) -> str:
        """Return the path of the node's owning module."""
        return str(node.meta.get("module", ""))

    def linear(
        self,
        role: str,
        linear: Linear,
        columns: Tensor | None,
        evidence: str,
        *,
        attention: fx.Node | None = None,
        bare: bool = False,
    ) -> None:
        """Assign a role to a linear map, for some or all of its output columns."""
        if columns is not None and columns.numel() == linear.out:
            columns = None
        roles = self.roles[linear.node]
        if role in roles:
            before = roles[role]
            if before is None or (columns is not None and bool(torch.isin(columns, before).all())):
                return
            self.findings = [f for f in self.findings if f.node is not linear.node or not f.role.endswith(role)]
            columns = None if columns is None else torch.unique(torch.cat([before, columns]))
            columns = None if columns is not None and columns.numel() == linear.out else columns
        roles[role] = columns
        kind = SiteKind.EXPERTS if linear.experts else SiteKind.LINEAR
        rows = self._stored_rows(linear, columns)
        parameter = linear.parameter
        if rows is not None:
            evidence += f", rows {format_runs(rows)} of {self.short(linear.node)}"
        if not self._is_stored(linear):
            names = " and ".join(str(n.target) for n in self.flow.parameters(linear.weight))
            self.fail(
                linear.node, f"is {role}, but its weight is computed from {names}, whose rows cannot be determined"
            )
            parameter, rows = None, None
        prefix = "" if bare else self.prefix(linear.node, attention)
        self.add(role, kind, linear.node, parameter, evidence, rows=rows, prefix=prefix)

    def short(self, node: fx.Node) -> str:
        """Return the last segment of the owning module's path."""
        return self.module(node).rpartition(".")[2] or node.name

    def _is_stored(self, linear: Linear) -> bool:
        """Return whether the rows of the weight are rows of one stored parameter."""
        if linear.parameter is None:
            return False
        return linear.experts or linear.weight.op == "get_attr" or self._mapped(linear) is not None

    def _stored_rows(self, linear: Linear, columns: Tensor | None) -> Runs | None:
        """Return the rows of the stored parameter behind these output columns; None for all rows."""
        mapped = self._mapped(linear)
        if mapped is None:
            return None if columns is None else runs_of(columns)
        rows, total = mapped
        own = torch.unique(rows if columns is None else rows[columns])
        return None if own.numel() == total else runs_of(own)

    def add(
        self,
        role: str,
        kind: SiteKind,
        node: fx.Node,
        parameter: str | None,
        evidence: str,
        *,
        rows: Runs | None = None,
        prefix: str | None = None,
    ) -> None:
        """Record a finding; its role gets a prefix, by default the node's prefix."""
        module = self.module(node)
        full = (self.prefix(node) if prefix is None else prefix) + role
        self.findings.append(Finding(full, kind, node, module, parameter, rows, *place(module), 0, evidence))

    def fail(self, node: fx.Node, reason: str) -> None:
        """Record why a node has no role; only the first reason is kept."""
        module = self.module(node)
        self.unresolved.setdefault(node, Unresolved(module, *place(module), reason))

    # --- results ---------------------------------------------------------------------------------------

    def report_rest(self) -> None:
        """Record a reason for every linear map without a role and for every fused map with rows that have no role."""
        for node, linear in {**self.flow.linears, **self.flow.depthwise}.items():
            roles = self.roles.get(node)
            if not roles:
                self.fail(node, self._why(node))
            elif all(c is not None for c in roles.values()) and not linear.experts:
                taken = torch.zeros(linear.out, dtype=torch.bool)
                for columns in roles.values():
                    taken[columns] = True
                free = torch.nonzero(~taken).flatten()
                if free.numel():
                    self.fail(node, f"rows {format_runs(runs_of(free))} reach nothing that determines their role")

    def _why(self, node: fx.Node) -> str:
        reason = self._misfit(node)
        linear = self.flow.linears.get(node)
        other = [f.role for f in self.findings if linear is not None and f.parameter == linear.parameter is not None]
        return f"{reason}; another use of the weight is {other[0]}" if other else reason

    def _misfit(self, node: fx.Node) -> str:
        below = [n for n in self.flow.attentions.values() if self._scores_from(node, n)]
        if below:
            return f"reaches the scores of {below[0].name} in addition to its queries and keys"
        linear = self.flow.linears.get(node)
        if linear is not None and not self.flow.is_data(linear.input):
            return "does not depend on the inputs: its result is a constant"
        if node in self.flow.depthwise:
            return "a depthwise convolution outside of branches that mix positions without attention"
        if self.in_stream(node):
            return "lies on the residual stream itself (projects the embeddings, or joins two streams)"
        gated = [n for n in self.flow.attentions if self._gates(node, n)]
        if gated:
            return f"is a gate on the output of {self.flow.attentions[gated[0]].name}"
        if not any(self.flow.is_above(node, r) for r in self.flow.residuals):
            return "lies in no residual branch and does not feed the output projection"
        return "its place in the residual branch fits no known form"

    def _gates(self, node: fx.Node, attention: fx.Node) -> bool:
        """Return whether an output projection reads both this map and an attention call."""
        projections = (n for n, roles in self.roles.items() if "attn.o" in roles)
        return any({node, attention} <= {*self.nearest(self.flow.linears[n].input)} for n in projections)

    def _scores_from(self, node: fx.Node, attention: Attention) -> bool:
        read = (source for source in attention.node.all_input_nodes if source is not attention.value)
        return any(node in self.nearest(source) for source in read)

    def structure(self, sublayers: Sequence[Sublayer], heads: Mapping[fx.Node, Heads]) -> Structure:
        """Return the collected structure, in graph order."""
        at = self.flow.at
        users: dict[tuple[str, str], set[fx.Node]] = defaultdict(set)
        for node, linear in {**self.flow.linears, **self.flow.depthwise}.items():
            users[self.module(node), linear.parameter or ""].add(node)
        for finding in self.findings:
            users[finding.module, finding.parameter or ""].add(finding.node)
        order = {key: sorted(nodes, key=at.__getitem__) for key, nodes in users.items()}
        findings = [replace(f, use=order[f.module, f.parameter or ""].index(f.node)) for f in self.findings]
        findings.sort(key=lambda f: at[f.node])
        rest = [u for n, u in sorted(self.unresolved.items(), key=lambda item: at[item[0]]) if not self._settled(n)]
        return Structure(tuple(findings), tuple(rest), tuple(sublayers), heads)

    def _settled(self, node: fx.Node) -> bool:
        """Return whether the whole weight has received a role in the meantime."""
        roles = self.roles.get(node)
        linear = self.flow.linears.get(node)
        return bool(roles) and linear is not None and self._is_stored(linear) and None in (roles or {}).values()

    def journey(self, node: fx.Node) -> str:
        """Return the operations between a value and its sources, for evidence: `` through norm and rotary``."""
        through = self.columns.through.get(node, Through.NOTHING)
        words = [w for mark, w in ((Through.NORM, "norm"), (Through.ROTARY, "rotary")) if through & mark]
        return " through " + " and ".join(words) if words else ""
