"""Attention projections, and which attentions look across to another stream."""

from __future__ import annotations

from torch import fx

from graftc.compiler.columns import Through
from graftc.compiler.flow import Attention
from graftc.compiler.labels import Labels
from graftc.specs.claims import SiteKind


def read_attentions(labels: Labels) -> None:
    """Label attentions with their query, key, value and output projections, and low-rank stages before those."""
    _find_crosses(labels)
    for attention in labels.flow.attentions.values():
        name = attention.name
        labels.add("attn", SiteKind.ATTENTION, attention.node, None, f"is {name}", attention=attention.node)
        for letter, operand in (("q", attention.query), ("k", attention.key), ("v", attention.value)):
            _projection(labels, attention, letter, operand)
    for attention in labels.flow.attentions.values():
        _output(labels, attention)
    for attention in labels.flow.attentions.values():
        for role, operands in (
            ("lowrank.q", (attention.query,)),
            ("lowrank.kv", (attention.key, attention.value)),
        ):
            for operand in operands:
                _low_rank(labels, attention, role, operand)


def _projection(labels: Labels, attention: Attention, letter: str, operand: fx.Node) -> None:
    found = labels.linear_columns(operand)
    for node, columns in found.items():
        linear = labels.flow.linears[node]
        evidence = f"{letter}: reaches {attention.name}{labels.journey(operand)}"
        labels.linear(f"attn.{letter}", linear, columns, evidence, attention=attention.node)
    if found:
        return
    nearest = labels.nearest(operand)
    if not labels.flow.is_data(operand) and not nearest:
        reason = f"{letter} of {attention.name} is a constant"
    elif any(n in labels.flow.linears for n in nearest):
        reason = f"columns of {letter} of {attention.name} cannot be followed"
        for node in nearest:
            if node in labels.flow.linears:
                labels.fail(node, f"reaches {letter} of {attention.name}, but its columns cannot be followed")
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


def _low_rank(labels: Labels, attention: Attention, role: str, operand: fx.Node) -> None:
    """The stage before a projection: a linear map whose columns the projection reads."""
    letter = role.removeprefix("lowrank.")
    for node in labels.linear_columns(operand):
        linear = labels.flow.linears[node]
        for first, columns in labels.linear_columns(linear.input).items():
            if labels.has_role(first, columns) or labels.in_stream(first):
                continue
            evidence = f"feeds the {letter} projection of {attention.name}{labels.journey(linear.input)}"
            labels.linear(role, labels.flow.linears[first], columns, evidence, attention=attention.node)


def _find_crosses(labels: Labels) -> None:
    """Cross-attention: keys come from a stream that the queries' stream does not continue."""
    lines = _Lines(labels)
    first: Attention | None = None
    for attention in labels.flow.attentions.values():
        query, key = lines.of(attention.query), lines.of(attention.key)
        if query and key and not query & key:
            labels.crosses.add(attention.node)
            first = first or attention
    if first is not None:
        flow = labels.flow
        memory = 0
        for node in labels.linear_columns(first.key):
            at = flow.at[flow.linears[node].input]
            memory |= flow.above[at] | 1 << at
        at = flow.at[first.query]
        labels.encoder = memory & ~(flow.above[at] | 1 << at)


class _Lines:
    """Residual streams: all adds on one stream, and what the stream starts from, are one line."""

    def __init__(self, labels: Labels) -> None:
        self.labels = labels
        self._parent: dict[int, int] = {}
        for residual in labels.flow.residuals.values():
            own = labels.columns.number[residual.node]
            for source in labels.nearest(residual.stream):
                self._join(own, labels.columns.number[source])

    def of(self, node: fx.Node) -> set[int]:
        """Lines that ``node`` is read from, through any number of linear maps."""
        labels = self.labels
        found: set[int] = set()
        pending, seen = labels.nearest(node), set()
        while pending:
            source = pending.pop()
            if source in seen:
                continue
            seen.add(source)
            number = labels.columns.number[source]
            if number not in self._parent and source in labels.flow.linears:
                pending += labels.nearest(labels.flow.linears[source].input)
            elif number not in self._parent and source in labels.flow.attentions:
                pending += labels.nearest(labels.flow.attentions[source].query)
            else:
                found.add(self._root(number))
        return found

    def _root(self, number: int) -> int:
        while self._parent.get(number, number) != number:
            number = self._parent[number]
        return number

    def _join(self, first: int, second: int) -> None:
        for number in (first, second):
            self._parent.setdefault(number, number)
        self._parent[self._root(second)] = self._root(first)
