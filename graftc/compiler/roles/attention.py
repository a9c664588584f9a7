"""Label attention projections, and detect attention calls whose keys come from another stream."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.columns import Through
from graftc.compiler.roles.findings import Heads
from graftc.compiler.roles.flow import Attention, tensor_nodes
from graftc.compiler.roles.operators import MOVING, PASSING
from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.sites import AttentionOperands
from graftc.passes.core.worklist import Worklist
from graftc.specs.claims import SiteKind


def read_attentions(labels: Labels) -> None:
    """Label attention calls, their query, key, value and output projections, and low-rank stages before these."""
    _find_crosses(labels)
    attentions = [a for a in labels.flow.attentions.values() if not _pools_stream(labels, a)]
    for attention in attentions:
        prefix = labels.prefix(attention.node, attention.node)
        labels.add("attn", SiteKind.ATTENTION, attention.node, None, f"is {attention.name}", prefix=prefix)
        for letter, operand in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            _projection(labels, attention, letter, operand)
    for attention in attentions:
        _output(labels, attention)
    for attention in attentions:
        _low_rank(labels, attention)


def _pools_stream(labels: Labels, attention: Attention) -> bool:
    """Return whether a call weights values of the stream by a constant query, without projections; report it if so."""
    if labels.flow.is_data(attention.query) or labels.linear_columns(attention.query):
        return False
    if all(n in labels.flow.linears for n in labels.nearest(attention.key)):
        return False
    reason = f"{attention.name} weights values of the stream by a constant query, without projections"
    labels.fail(attention.node, reason)
    return True


def _projection(labels: Labels, attention: Attention, letter: str, operand: fx.Node) -> None:
    projections = labels.linear_columns(operand)
    for node, columns in projections.items():
        linear = labels.flow.linears[node]
        if linear.experts:
            labels.fail(node, f"a 3-D weight that reaches {letter} of {attention.name}")
            continue
        evidence = f"{letter}: reaches {attention.name}{labels.journey(operand)}"
        labels.linear(f"attn.{letter}", linear, columns, evidence, attention=attention.node)
    if projections:
        return
    linears = labels.nearest_linears(operand)
    for node in linears:
        labels.fail(node, f"reaches {letter} of {attention.name}, but its columns cannot be followed")
    if linears:
        reason = f"columns of {letter} of {attention.name} cannot be followed"
    elif not labels.flow.is_data(operand) and not labels.nearest(operand):
        reason = f"{letter} of {attention.name} is a constant"
    else:
        reason = f"{letter} of {attention.name} has no projection of its own"
    labels.fail(attention.node, reason)


def _output(labels: Labels, attention: Attention) -> None:
    number = labels.columns.number[attention.node]
    for node, linear in labels.flow.linears.items():
        if labels.columns.front.get(linear.input, 0) >> number & 1 and not labels.has_role(node):
            evidence = f"o: reads the output of {attention.name}"
            if labels.columns.through.get(linear.input, Through.NOTHING) & Through.NONLINEAR:
                evidence += " times a gate"
            labels.linear("attn.o", linear, None, evidence, attention=attention.node)


def _low_rank(labels: Labels, attention: Attention) -> None:
    """Label the stages before the projections: linear maps whose columns the projections read."""
    queries = _stages(labels, (attention.query,))
    keys = _stages(labels, (attention.key, attention.value))
    for role, stages in (("lowrank.q", queries), ("lowrank.kv", keys)):
        for node, columns in stages.items():
            if node in queries and node in keys and bool(torch.isin(queries[node], keys[node]).any()):
                labels.fail(node, f"feeds both the queries and the keys or values of {attention.name}")
                continue
            evidence = f"feeds the {role.removeprefix('lowrank.')} projection of {attention.name}"
            labels.linear(role, labels.flow.linears[node], columns, evidence, attention=attention.node)


def _stages(labels: Labels, operands: tuple[fx.Node, ...]) -> dict[fx.Node, Tensor]:
    stages: dict[fx.Node, Tensor] = {}
    for operand in operands:
        for node in labels.linear_columns(operand):
            for first, columns in labels.linear_columns(labels.flow.linears[node].input).items():
                if labels.has_role(first, columns) or labels.in_stream(first):
                    continue
                if labels.flow.linears[first].mixes:
                    labels.fail(first, f"a convolution over positions before {labels.short(node)}")
                else:
                    both = [stages[first], columns] if first in stages else [columns]
                    stages[first] = torch.unique(torch.cat(both))
    return stages


def _find_crosses(labels: Labels) -> None:
    """Record the cross-attention calls and, if there are any, the nodes of the encoder.

    The keys of such a call come from a stream that differs from the queries' stream and does not read that stream.
    """
    lines = _Lines(labels)
    first: Attention | None = None
    for attention in labels.flow.attentions.values():
        query, key = lines.of(attention.query), lines.of(attention.key)
        if query and key and not query & key and not any(lines.depends(k, q) for k in key for q in query):
            labels.crosses.add(attention.node)
            first = first or attention
    if first is not None:
        flow = labels.flow
        memory = 0
        for node in labels.linear_columns(first.key):
            memory |= flow.up_to(flow.linears[node].input)
        labels.encoder = memory & ~flow.up_to(first.query)


class _Lines:
    """Residual streams, here called lines: a line is all adds on a stream and the values from which it starts."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._parent: dict[int, int] = {}
        for residual in labels.flow.residuals.values():
            own = labels.columns.number[residual.node]
            for source in labels.nearest(residual.stream):
                self._join(own, labels.columns.number[source])

    def of(self, node: fx.Node) -> set[int]:
        """Return the lines from which ``node`` is computed, through any number of weights."""
        labels = self.labels
        roots = {*labels.flow.embeddings, *(n for n in labels.columns.sources if n.op == "placeholder")}
        lines: set[int] = set()
        sources = Worklist(labels.nearest(node))
        for source in sources:
            number = labels.columns.number[source]
            if number in self._parent or source in roots:
                lines.add(self._root(number))
            else:
                attention = labels.flow.attentions.get(source)
                above = [attention.query] if attention else source.all_input_nodes
                sources += (n for operand in above for n in labels.nearest(operand))
        return lines

    def depends(self, line: int, other: int) -> bool:
        """Return whether a branch of one line reads a value from which the other line starts."""
        flow, sources = self.labels.flow, self.labels.columns.sources
        members = [(self._root(number), sources[number]) for number in self._parent]
        starts = flow.marked(n for root, n in members if root == other and n not in flow.residuals)
        return any(flow.above[flow.at[n]] & starts for root, n in members if root == line and n in flow.residuals)

    def _root(self, number: int) -> int:
        while self._parent.get(number, number) != number:
            number = self._parent[number]
        return number

    def _join(self, first: int, second: int) -> None:
        for number in (first, second):
            self._parent.setdefault(number, number)
        self._parent[self._root(second)] = self._root(first)


def read_heads(labels: Labels) -> dict[fx.Node, Heads]:
    """Return the columns of each head's keys and values, for attention calls with the same columns at all positions."""
    heads = {}
    for node, attention in labels.flow.attentions.items():
        keys, values = (_headed(labels, attention, operand) for operand in (attention.key, attention.value))
        if keys is not None and values is not None:
            heads[node] = Heads(keys[1], values[1], AttentionOperands(attention.query, keys[0], values[0]))
    return heads


def _headed(labels: Labels, attention: Attention, operand: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """Return the value ``[rows, heads, keys, width]`` behind an operand, and each head's columns in it.

    For a fused call, that value is the operand itself.
    """
    if not attention.written_out:
        columns = _columns(labels, operand)
        return None if columns is None else (operand, columns)
    node = operand
    while op_name(node) in _LAID_OUT:
        columns = _columns(labels, node)
        if columns is not None:
            return node, columns
        source = next((n for n in tensor_nodes(node.args[:2]) if labels.flow.is_data(n)), None)
        if source is None:
            return None
        node = source
    return None


_LAID_OUT = MOVING | PASSING | {"mul", "div"}


def _columns(labels: Labels, operand: fx.Node) -> Tensor | None:
    index = labels.columns.index(operand)
    if index is None or index.dim() != 4 or index.shape != labels.columns.shape(operand):
        return None
    return labels.columns.once(_behind_a_past if labels.columns.cached else _of_heads, index)


def _behind_a_past(index: Tensor) -> Tensor | None:
    """Return each head's columns, taken only from the call's own tokens, which follow those of its past."""
    return _of_heads(index[:, :, (index >= 0).any(dim=3).any(dim=1).any(dim=0)])


def _of_heads(own: Tensor) -> Tensor | None:
    first = own[:1, :, :1]
    if not own.numel() or not bool((own == first).all()) or bool((first < 0).any()):
        return None
    numbers: Tensor = torch.unique(first[0, :, 0], return_inverse=True)[1]
    return numbers
