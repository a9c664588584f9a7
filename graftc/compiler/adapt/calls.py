"""Adapt layers that call functions: whatever is inserted into a body is also inserted for every call to it.

A method inserts into a body as into any layer. For each call, it then inserts into a copy of the body with the call's
own tensors. This step creates these tensors and verifies that the call computes the same as the adapted body. If that
follows from the spec and the types of tensors alone (`Method.repeats`), verifying the first call is enough; for the
other calls, only the tensors are created.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graftc.compiler.adapt.context import Adapting
from graftc.compiler.adapt.insert import RECOMPUTE, insert_single
from graftc.compiler.capture.alike.written import alike_arguments
from graftc.compiler.resolve.compose import units
from graftc.compiler.resolve.moved import SiteMove
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.functions import (
    Bodies,
    FunctionCall,
    UnlikeBodyError,
    calls,
    in_layer,
    moved_meta,
    region,
    renamed,
)
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import Program, above, is_random
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.pipeline import Pass
from graftc.passes.core.sites.sites import Site
from graftc.passes.core.weights.tensor_edits import TensorEdits
from graftc.specs.base import MethodSpec


@dataclass
class _Template:
    """A body before any insertion, from which copies are made and with which they are compared.

    Attributes:
        base: the Program before any insertion.
        given, results: the body's input and result nodes in the base.
        nodes: the base nodes from the body's inputs to its results, each with its counterpart in the adapted Program.
        body: path of the body's layer.
        inside: the nodes that the body computes in the adapted Program.
    """

    base: Program
    given: list[fx.Node]
    results: list[fx.Node]
    nodes: dict[fx.Node, fx.Node]
    body: str
    inside: set[fx.Node]

    @classmethod
    def of(cls, base: Program, one: FunctionCall, now: FunctionCall, adapted: Mapping[str, fx.Node]) -> _Template:
        """Build a template from a call as it was in the base and as it is now.

        ``adapted`` contains the adapted Program's nodes by name.
        """
        given, outputs = one.given, one.body_results
        wanted = sorted({*above(outputs, stop=given), *given, *base.placeholders()})
        inside = set(region(set(now.given), now.body_results, now.body))
        return cls(base, given, outputs, {node: adapted[node.name] for node in wanted}, one.body, inside)

    def copy(self, path: str) -> tuple[Program, dict[fx.Node, fx.Node]]:
        """Return a copy of the body with another layer's tensors, and the copy's nodes by the adapted Program's nodes.

        The outputs of the copy are its inputs and its results; the computation of its inputs is left out.
        """
        graph, nodes, given = fx.Graph(), dict[fx.Node, fx.Node](), set(self.given)
        for node in self.nodes:
            if node in given:
                new = nodes[node] = graph.create_node(node.op, node.target, (), None, node.name)
            else:
                new = nodes[node] = copy_node(graph, node, nodes.__getitem__)
            if node.op == "get_attr":
                new.target = renamed(str(node.target), self.body, path)
            new.meta.update(moved_meta(node, self.body, path))
        graph.output(tuple(nodes[node] for node in (*self.given, *self.results)))
        program = replace(self.base, graph=graph, edits=Edits(), history=[], tensor_edits=TensorEdits(), memory=None)
        program.limits = dict(self.base.limits)
        return program, {adapted: nodes[node] for node, adapted in self.nodes.items()}


def _insert_in_calls(program: Program, context: Adapting) -> None:
    base = {one.path: one for one in calls(context.base.graph)}
    named = {node.name: node for node in program.graph.nodes}
    templates: dict[str, _Template] = {}
    bodies = Bodies()
    sites = _sites_of_calls(context)
    shown: dict[str, str] = {}
    repeated = _Repeated(program, context)
    for now in calls(program.graph):
        # For later signatures, the first signature has verified that layers are adapted alike.
        if context.places is not None and all(name in context.store for name in bodies.tensors(now)):
            continue
        if now.body in shown:
            repeated.make(shown[now.body], now.path, sites[now.path])
            continue
        if now.body not in templates:
            templates[now.body] = _Template.of(context.base, base[now.path], now, named)
        edited = _insert_in_call(program, context, now, templates[now.body], sites[now.path])
        if not edited and repeated.is_possible(sites[now.path]):
            shown[now.body] = now.path


Sites = Mapping[str, list[tuple[Site, MethodSpec]]]
"""The sites of one layer, each with the spec that applies there, by adaptation name."""


def _sites_of_calls(context: Adapting) -> Mapping[str, Sites]:
    """Return the sites in every layer that calls a function, by layer path."""
    by_layer: dict[str, dict[str, list[tuple[Site, MethodSpec]]]] = defaultdict(lambda: defaultdict(list))
    for item in context.resolved:
        for site, spec in item.sites:
            if context.is_called(site):
                by_layer[layer_path(site.key.module)][item.name].append((site, spec))
    return by_layer


class _Repeated:
    """Creates the tensors of further calls from those recorded for a body's first call."""

    def __init__(self, program: Program, context: Adapting) -> None:
        self._program, self._context = program, context
        self._items = [unit.members[0] for unit in units(context.compilation.spec, context.resolved)]
        self._builders: dict[str, Builder] = {}

    def is_possible(self, sites: Sites) -> bool:
        """Return whether everything that further calls of the body need was recorded for the first call."""
        parts, starts = self._context.work.parts, self._context.starts
        return all(
            method_for(spec.method).repeats(spec) and starts.keys() >= set(parts[name].get(site.key, {}).values())
            for name, pairs in sites.items()
            for site, spec in pairs
        )

    def make(self, before: str, path: str, sites: Sites) -> None:
        """Create a call's tensors.

        Args:
            before: path of the recorded call.
            path: path of this call.
            sites: the sites of this call.
        """
        context = self._context
        for item in self._items:
            if item.name not in sites:
                continue
            if item.name not in self._builders:
                self._builders[item.name] = context.builder(self._program, item.name, item.spec.method)
            build, known = self._builders[item.name], context.work.parts[item.name]
            for site, _ in sites[item.name]:
                like = replace(site.key, module=renamed(site.key.module, path, before))
                with build.on(site):
                    for part, name in known.get(like, {}).items():
                        build.begin(part, context.starts[name])
            keys = (site.key for site, _ in sites[item.name])
            context.work.enter(item.name, {key: build.parts[key] for key in keys if key in build.parts})


def _insert_in_call(program: Program, context: Adapting, now: FunctionCall, template: _Template, sites: Sites) -> bool:
    """Insert into a copy of the body, and return whether any of the call's base tensors is edited.

    Raises:
        UnlikeBodyError: if the call does not compute the same as the body.
    """
    copy, nodes = template.copy(now.path)
    move, elsewhere = SiteMove(now.path, now.path, nodes), SiteMove("", "", nodes)
    local = {id(site): site for pairs in sites.values() for site, _ in pairs}
    local = {number: move.site(site) for number, site in local.items()}
    mine = set(map(id, local.values()))
    for unit in units(context.compilation.spec, context.resolved):
        (item,) = unit.members
        # A method that creates something for all sites together needs all sites again.
        every = sites[item.name] if item.name in context.prepared else item.sites
        own = tuple((local.get(id(site)) or elsewhere.site(site), spec) for site, spec in every)
        insert_single(copy, context, unit, replace(item, sites=own), lambda site: id(site) in mine)
    if RECOMPUTE.wanted is not None and RECOMPUTE.wanted(copy, context):
        RECOMPUTE.apply(copy, context)
    _require_same(program, now, copy, nodes, template.inside)
    edits = [edit for edit in copy.tensor_edits if edit.own.tensor.startswith(f"{now.path}.")]
    for edit in edits:
        program.tensor_edits.add(edit)
    return bool(edits)


def _require_same(
    program: Program,
    now: FunctionCall,
    copy: Program,
    nodes: Mapping[fx.Node, fx.Node],
    inside: Collection[fx.Node],
) -> None:
    """Check that a call computes the same as the body into which adaptations have been inserted.

    Args:
        program: the Program with the body.
        now: the call.
        copy: the body with the call's tensors, with the same adaptations inserted.
        nodes: a map from the Program's nodes to those of the copy. Nodes that the Program computes outside the body may
            be adapted in the Program but not in the copy.
        inside: the nodes that the body computes.

    Raises:
        UnlikeBodyError: if the call computes something else.
    """
    outputs: Any = copy.output_node.args[0]
    count = len(now.given)
    given, results = outputs[:count], outputs[count:]
    if any(node.meta.get("custom") for node in given):
        raise UnlikeBodyError(f"something is inserted in front of {now.path}")
    same: dict[fx.Node, fx.Node] = dict(zip(now.given, given, strict=True))
    pending = list(zip(now.body_results, results, strict=True))
    first = max(now.given)
    origins = {theirs: ours for ours, theirs in nodes.items()}
    while pending:
        ours, theirs = pending.pop()
        if is_random(ours) and ours < first and in_layer(ours, now.body):
            raise UnlikeBodyError(f"{ours.name} is drawn before {now.body} begins")
        origin = origins.get(theirs) if ours not in inside else None
        if origin is not None and (origin is ours or program.current(origin) is ours):
            continue
        if ours in same:
            if same[ours] is not theirs:
                raise UnlikeBodyError(f"{ours.name} is not what {now.path} computes")
            continue
        same[ours] = theirs
        read: list[tuple[fx.Node, fx.Node]] = []
        alike = alike_arguments((ours.args, ours.kwargs), (theirs.args, theirs.kwargs), read)
        named = ours.op in ("get_attr", "placeholder")
        target = renamed(str(ours.target), now.body, now.path) if named else ours.target
        if not alike or ours.op != theirs.op or target != theirs.target:
            raise UnlikeBodyError(f"{ours.name} is not what {now.path} computes")
        pending += read


CALLS: Pass[Adapting] = Pass(
    "insert in calls",
    _insert_in_calls,
    frozenset({"adapted"}),
    frozenset({"calls adapted"}),
    wanted=lambda program, context: bool(calls(program.graph)),
    rewrites=False,
    verified=True,
)
"""Create the tensors of layers that call functions, and verify that these layers compute the same as the bodies."""
