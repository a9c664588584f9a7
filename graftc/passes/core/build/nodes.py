"""The part of the `Builder` that inserts nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.program import Program, nodes_in
from graftc.passes.core.sites.sites import Site, SiteKey
from graftc.passes.core.weights.store import Store

aten = torch.ops.aten


class NodeBuilder:
    """Inserts nodes of one adaptation into one Program.

    Args:
        program: changed in place.
        store: new tensors go here; one that exists already is used again, so that Programs share tensors.
        adaptation: the adaptation's name.
        method: its method's tag.
        seed: initial values depend on it and on a tensor's name, never on the order of creation.
        values: tensors that are there already, by name: they take the place of initial values.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        adaptation: str,
        method: str,
        seed: int = 0,
        values: Mapping[str, Tensor] = MappingProxyType({}),
    ) -> None:
        self.program = program
        self.store = store
        self.adaptation = adaptation
        self.method = method
        self.seed = seed
        self.values = values
        self.parts: dict[SiteKey | None, dict[str, str]] = {}
        self._types = Inference(program)
        self._attributes: dict[str, fx.Node] = {str(n.target): n for n in program.graph.find_nodes(op="get_attr")}
        self._dropouts: dict[tuple[fx.Node, float, bool, SiteKey | None], fx.Node] = {}
        self._site: Site | None = None
        self._emitted: set[fx.Node] = set()

    @contextmanager
    def on(self, site: Site) -> Iterator[None]:
        """Nodes made inside belong to ``site``."""
        previous = self._site, self._emitted
        self._site, self._emitted = site, set()
        try:
            yield
        finally:
            self._site, self._emitted = previous

    def call(self, target: Any, *args: Any, part: str = "", **kwargs: Any) -> fx.Node:
        """Insert a call after the latest of its arguments and return its node.

        Args:
            target: an operator.
            args, kwargs: its arguments; nodes and literals.
            part: what the node is within the adaptation, for people (``"down"``).
        """
        graph = self.program.graph
        sources = nodes_in((args, kwargs))
        computed = [n for n in sources if n.op != "get_attr"]
        point: fx.Node = max(computed) if computed else self._first_call().prev
        if point.op == "placeholder":  # inputs stay in front of everything that is computed
            point = max(self.program.placeholders())
        with graph.inserting_after(point):
            node = graph.call_function(target, args, kwargs)
        for source in sources:
            if source.op == "get_attr" and source > node:
                node.prepend(source)
        node.meta = {"val": self._types.call(target, args, kwargs), **self._tags(part)}
        self._emitted.add(node)
        return node

    def _first_call(self) -> fx.Node:
        first: fx.Node = next(n for n in self.program.graph.nodes if n.op in ("call_function", "output"))
        return first

    def _tags(self, part: str) -> dict[str, Any]:
        site = str(self._site.key) if self._site is not None else ""
        origin = {"adaptation": self.adaptation, "method": self.method, "site": site, "part": part}
        module = self._site.key.module if self._site is not None else ""
        return {"module": module, "custom": {"graftc": origin}}

    @property
    def site(self) -> Site:
        """The site that nodes are made for now."""
        assert self._site is not None
        return self._site

    def fake(self) -> FakeTensorMode:
        """The fake mode that the nodes' values live in."""
        return self._types.fake

    def attribute(self, name: str, part: str = "") -> fx.Node:
        """The node that reads a tensor of the Store."""
        known: fx.Node | None = self._attributes.get(name)
        if known is not None:
            return known
        graph = self.program.graph
        with graph.inserting_before(self._first_call()):
            node = graph.get_attr(name)
        node.meta = {"val": self._types.tensor(self.store.get(name)), **self._tags(part)}
        self._attributes[name] = node
        return node

    def _emit(self, part: str) -> Callable[..., fx.Node]:
        return lambda target, *args: self.call(target, *args, part=part)

    def _redirect(
        self, before: fx.Node, after: fx.Node, take: Callable[[fx.Node], bool], *, narrow: bool = False
    ) -> None:
        if after is before:
            return
        before.replace_all_uses_with(
            after, delete_user_cb=lambda u: u is not after and u not in self._emitted and take(u)
        )
        site = str(self._site.key) if self._site is not None else ""
        self.program.edits.add(Edit(self.adaptation, site, before, after, narrow))
