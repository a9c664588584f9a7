"""The insertion of nodes of one adaptation into one Program, which all parts of the `Builder` share."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graftc.passes.core.build.initial import Initial
from graftc.passes.core.build.seams import Change, Reading, Seams
from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import create_node
from graftc.passes.core.ir.program import Program, memory_of, nodes_in
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey
from graftc.passes.core.weights.store import Store

aten = torch.ops.aten


class Nodes:
    """Inserts nodes of one adaptation into one Program.

    Args:
        program: the Program, changed in place.
        store: the Store that new tensors are added to; an existing one is reused, so that Programs share tensors.
        adaptation: the adaptation's name.
        method: its method's tag.
        initial: the source of the values of new tensors.
        seams: the composition of the adaptation with others; by default there is none.
        within: the `Nodes` of the composing adaptation, if any. Nodes inserted at a site then count as that
            adaptation's own, which keep reading what was there before.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        adaptation: str,
        method: str,
        initial: Initial,
        seams: Seams[Nodes] | None = None,
        within: Nodes | None = None,
    ) -> None:
        self.program = program
        self.store = store
        self.adaptation = adaptation
        self.method = method
        self.initial = initial
        self.seams = seams if seams is not None else Seams()
        self.parts: dict[SiteKey | None, dict[str, str]] = {}
        self.starts: dict[str, Any] = {}
        self._types = Inference(program)
        self._within = within
        self.attributes: dict[str, fx.Node] = {str(n.target): n for n in program.graph.find_nodes(op="get_attr")}
        self.current: Site | None = None
        self._emitted: set[fx.Node] = set()
        self._first: fx.Node | None = None

    @contextmanager
    def on(self, site: Site) -> Iterator[None]:
        """Run the block with ``site`` as the current site, which new nodes belong to."""
        previous = self.current, self._emitted
        self.current, self._emitted = site, set() if self._within is None else self._within._emitted
        try:
            yield
        finally:
            self.current, self._emitted = previous

    @contextmanager
    def owned(self, adaptation: str, parts: dict[SiteKey | None, dict[str, str]]) -> Iterator[None]:
        """Run the block with another adaptation as the owner of new tensors, which are recorded in its ``parts``."""
        previous = self.adaptation, self.parts
        self.adaptation, self.parts = adaptation, parts
        try:
            yield
        finally:
            self.adaptation, self.parts = previous

    def call(self, target: Any, *args: Any, part: str = "", **kwargs: Any) -> fx.Node:
        """Implement `Builder.call`."""
        graph = self.program.graph
        sources = nodes_in((args, kwargs))
        computed = [n for n in sources if n.op != "get_attr"]
        point: fx.Node = max(computed) if computed else self._first_call().prev
        point = max([point, *self._writes_before(computed)])
        if point.op == "placeholder":  # inputs stay in front of everything that is computed
            point = max(self.program.placeholders())
        with graph.inserting_after(point):
            node = create_node(graph, "call_function", target, args, kwargs)
        for source in sources:
            if source.op == "get_attr" and source > node:
                node.prepend(source)
        if self._first is not None and node < self._first:
            self._first = node
        node.meta.update(val=self._types.call(target, args, kwargs), **self._tags(part))
        self._emitted.add(node)
        return node

    def _writes_before(self, sources: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the calls that write to the memory of values before the site's map reads it.

        The map reads the values as these calls leave them.
        """
        memory = memory_of(self.program)
        if not memory.writes or not isinstance(self.current, LinearSite):
            return []
        reader = self.current.use.node
        own = frozenset[fx.Node]().union(*map(memory.roots, sources))
        return [write for write, roots in memory.writes.items() if own & roots and write < reader]

    def _first_call(self) -> fx.Node:
        """Return the first node after inputs and tensors, cached because there may be thousands of tensors."""
        if self._first is None or self._first._erased:
            self._first = next(n for n in self.program.graph.nodes if n.op in ("call_function", "output"))
        return self._first

    def _tags(self, part: str) -> dict[str, Any]:
        site = str(self.current.key) if self.current is not None else ""
        origin = {"adaptation": self.adaptation, "method": self.method, "site": site, "part": part}
        module = self.current.key.module if self.current is not None else ""
        return {"module": module, "custom": {"graftc": origin}}

    def fake(self) -> FakeTensorMode:
        """Return the fake mode that the nodes' values belong to."""
        return self._types.fake

    def attribute(self, name: str, part: str = "") -> fx.Node:
        """Return the node that reads a tensor of the Store."""
        known: fx.Node | None = self.attributes.get(name)
        if known is not None:
            return known
        graph = self.program.graph
        with graph.inserting_before(self._first_call()):
            node = graph.get_attr(name)
        node.meta = {"val": self._types.tensor(self.store.get(name)), **self._tags(part)}
        self.attributes[name] = node
        return node

    def kept_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the element type that a tensor of the adaptation is stored in if the graph computes in ``dtype``."""
        if self.adaptation in self.initial.narrow or not dtype.is_floating_point:
            return dtype
        return torch.promote_types(dtype, torch.float32)

    def cast(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """Return a tensor of the adaptation, or a node computed from it, in the type that the graph computes with."""
        if dtype is None or node.meta["val"].dtype == dtype:
            return node
        return self.call(aten.to.dtype, node, dtype, part="cast")

    def emit(self, part: str) -> Callable[..., fx.Node]:
        """Return `call` as a function of the target and its positional arguments alone."""
        return lambda target, *args: self.call(target, *args, part=part)

    def size(self, node: fx.Node, axis: int) -> Any:
        """Return the size of an axis: a number, or a node that computes it."""
        size = node.meta["val"].shape[axis]
        return size if isinstance(expression(size), int) else self.call(aten.sym_size.int, node, axis, part="size")

    def device(self) -> torch.device:
        """Return the device of the current site's tensors."""
        if isinstance(self.current, LinearSite):
            return self.store.get(self.current.own.tensor).device
        return self.store.device(self.current.key.module if self.current is not None else "")

    def redirect(
        self, before: fx.Node, after: fx.Node, take: Callable[[fx.Node], bool], *, narrow: bool = False
    ) -> None:
        """Make the users of a node that ``take`` selects read another one, as an edit; only inside `Seams.write`."""
        if after is before:
            return
        before.replace_all_uses_with(
            after, delete_user_cb=lambda u: u is not after and u not in self._emitted and take(u)
        )
        site = str(self.current.key) if self.current is not None else ""
        self.program.edits.add(Edit(self.adaptation, site, before, after, narrow))


class Part:
    """A part of the `Builder`; it works with the nodes that all parts share."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes
        self.program, self.store, self.initial = nodes.program, nodes.store, nodes.initial
        self.call, self.attribute = nodes.call, nodes.attribute
        self._attributes, self._emit, self._redirect = nodes.attributes, nodes.emit, nodes.redirect
        self._size, self._device = nodes.size, nodes.device

    @property
    def adaptation(self) -> str:
        """The adaptation whose tensors are being created."""
        return self._nodes.adaptation

    @property
    def parts(self) -> dict[SiteKey | None, dict[str, str]]:
        """The Store names of the tensors created so far, by site and part; new ones are recorded here."""
        return self._nodes.parts

    @property
    def _site(self) -> Site | None:
        return self._nodes.current

    def _read(self, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """Return a value of the model, obtained through the seams."""
        return self._nodes.seams.read(self._nodes, node, kind, site)

    def _write(self, change: Change, put: Callable[..., None]) -> None:
        """Change values of the model through the seams.

        Raises:
            TypeError: if the types of the given and the model's values differ. In a sum, a narrower one is widened: a
                stream may be in float32 although the weights are in 16 bits.
        """
        if change.like is not None and change.given:
            mine, theirs = change.given[0].meta["val"].dtype, change.like.meta["val"].dtype
            after = torch.promote_types(mine, theirs) if change.kind == "sum" else mine
            if after != theirs:
                raise TypeError(f"it gives values of {mine} for values of {theirs}")
        self._nodes.seams.write(self._nodes, change, put)
