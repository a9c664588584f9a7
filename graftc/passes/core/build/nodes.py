"""Insert an adaptation's nodes into a Program: the foundation of all parts of the `Builder`."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import fx

from graftc.compat.fake_tensors import FakeTensorMode
from graftc.compat.graphs import is_erased
from graftc.passes.core.build.initial import Initial, ParameterStart
from graftc.passes.core.build.requests import Change, NewTensor, Reading
from graftc.passes.core.ir.edits import Edit
from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import create_node
from graftc.passes.core.ir.program import Program, memory_of, nodes_in
from graftc.passes.core.ir.shapes import expression
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey
from graftc.passes.core.weights.store import Store

aten = torch.ops.aten


class Nodes:
    """Inserts one adaptation's nodes into one Program: the base class of all parts of the `Builder`.

    Args:
        program: the Program, changed in place.
        store: the Store that new tensors are added to; existing tensors are reused, so that Programs share them.
        adaptation: the adaptation's name.
        method: its method's tag.
        initial: the source of new tensors' initial values.
        seams: the seams that compose the adaptation with others; by default, it is not composed.
        within: the builder of the composing adaptation, if any. Nodes inserted at a site then count as that
            adaptation's own nodes, which keep reading the values as they were before its changes.

    Attributes:
        adaptation: the adaptation whose tensors are being created.
        parts: the Store names of the adaptation's tensors, by site and part; the site is None if all sites share
            the tensor.
        starts: the initial states of the parameters created here, by name.
        slots: the members whose values new parameters have in their first slots, and the number of slots; None if new
            parameters have no axis of slots.
        find_places: the function that computes `places`.
        seed, values: the seed of the initial values, and the existing tensors, by name, that are used instead of them.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        adaptation: str,
        method: str,
        initial: Initial | None = None,
        *,
        seams: Seams | None = None,
        within: Nodes | None = None,
    ) -> None:
        self.program, self.store, self.adaptation, self.method = program, store, adaptation, method
        self.initial = Initial() if initial is None else initial
        self.seed, self.values = self.initial.seed, self.initial.values
        self.seams = seams if seams is not None else Seams()
        self.find_places: Callable[[], Mapping[str, Sequence[Site]]] = dict
        self.parts: dict[SiteKey | None, dict[str, str]] = {}
        self.starts: dict[str, ParameterStart] = {}
        self.slots: tuple[tuple[str, ...], int] | None = None
        self._types = Inference(program)
        self._composing = within
        self._attributes: dict[str, fx.Node] = {str(n.target): n for n in program.graph.find_nodes(op="get_attr")}
        self._site: Site | None = None
        self.emitted: set[fx.Node] = set()
        self._first_computed: fx.Node | None = None
        self._known: dict[Hashable, fx.Node] = {}

    @property
    def places(self) -> Mapping[str, Sequence[Site]]:
        """Every place that each adaptation has in the model, in order, by the adaptation's name.

        The Program may lack some of them.
        """
        return self.find_places()

    @contextmanager
    def on(self, site: Site) -> Iterator[None]:
        """Run the block with ``site`` as the current site, to which new nodes belong."""
        previous = self._site, self.emitted
        self._site, self.emitted = site, set() if self._composing is None else self._composing.emitted
        try:
            yield
        finally:
            self._site, self.emitted = previous

    @contextmanager
    def owned(self, adaptation: str, parts: dict[SiteKey | None, dict[str, str]]) -> Iterator[None]:
        """Run the block with another adaptation as the owner of new tensors, which are recorded in its ``parts``."""
        previous = self.adaptation, self.parts
        self.adaptation, self.parts = adaptation, parts
        try:
            yield
        finally:
            self.adaptation, self.parts = previous

    @contextmanager
    def in_slots(self, members: Sequence[str], count: int) -> Iterator[None]:
        """Run the block with new parameters stored for ``count`` slots at once: the members' values, then zeros."""
        self.slots = tuple(members), count
        try:
            yield
        finally:
            self.slots = None

    def call(self, target: Any, *args: Any, part: str = "", **kwargs: Any) -> fx.Node:
        """Insert a call after the last of its arguments and return its node.

        Args:
            target: the operator to call.
            args: its arguments, which are nodes and literals.
            kwargs: those passed by name.
            part: a readable label for the node within the adaptation (for example ``"down"``).
        """
        graph = self.program.graph
        sources = nodes_in((args, kwargs))
        computed = [n for n in sources if n.op != "get_attr"]
        point: fx.Node = max(computed) if computed else self._first_call().prev
        point = max([point, *self._writes_before(computed)])
        if point.op == "placeholder":  # inputs stay before all computed nodes
            point = max(self.program.placeholders())
        with graph.inserting_after(point):
            node = create_node(graph, "call_function", target, args, kwargs)
        for source in sources:
            if source.op == "get_attr" and source > node:
                node.prepend(source)
        if self._first_computed is not None and node < self._first_computed:
            self._first_computed = node
        node.meta.update(val=self._types.call(target, args, kwargs), **self._tags(part))
        self.emitted.add(node)
        return node

    def _writes_before(self, sources: Sequence[fx.Node]) -> list[fx.Node]:
        """Return the calls that write to the memory of ``sources`` before the site's map runs.

        The map reads the values that these calls leave behind.
        """
        memory = memory_of(self.program)
        if not memory.writes or not isinstance(self._site, LinearSite):
            return []
        reader = self._site.use.node
        own = frozenset[fx.Node]().union(*map(memory.roots, sources))
        return [write for write, roots in memory.writes.items() if own & roots and write < reader]

    def _first_call(self) -> fx.Node:
        """Return the first node after the inputs and tensors, cached because there may be thousands of tensors."""
        if self._first_computed is None or is_erased(self._first_computed):
            self._first_computed = next(n for n in self.program.graph.nodes if n.op in ("call_function", "output"))
        return self._first_computed

    def _tags(self, part: str) -> dict[str, Any]:
        origin = {"adaptation": self.adaptation, "method": self.method, "site": self._site_text, "part": part}
        return {"module": self._site.key.module if self._site is not None else "", "custom": {"graftc": origin}}

    @property
    def _site_text(self) -> str:
        return str(self._site.key) if self._site is not None else ""

    def fake(self) -> FakeTensorMode:
        """Return the fake tensor mode to which the nodes' values belong."""
        return self._types.fake

    def attribute(self, name: str, part: str = "") -> fx.Node:
        """Return the node that reads a Store tensor."""
        if name not in self._attributes:
            graph = self.program.graph
            with graph.inserting_before(self._first_call()):
                node = self._attributes[name] = graph.get_attr(name)
            node.meta = {"val": self._types.tensor(self.store.get(name)), **self._tags(part)}
        return self._attributes[name]

    def _once(self, key: Hashable, make: Callable[[], fx.Node]) -> fx.Node:
        """Return the node cached under ``key``, created with ``make`` on first request."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]

    def _kept_in(self, dtype: torch.dtype) -> torch.dtype:
        """Return the dtype in which the adaptation's tensors are stored if the graph computes in ``dtype``."""
        if self.adaptation in self.initial.narrow or not dtype.is_floating_point:
            return dtype
        return torch.promote_types(dtype, torch.float32)

    def cast(self, node: fx.Node, dtype: torch.dtype | None) -> fx.Node:
        """Cast an adapter tensor, or a node computed from one, to the graph's compute dtype."""
        if dtype is None or node.meta["val"].dtype == dtype:
            return node
        return self.call(aten.to.dtype, node, dtype, part="cast")

    def _emit(self, part: str) -> Callable[..., fx.Node]:
        """Return `call` as a function of only the target and its positional arguments."""
        return lambda target, *args: self.call(target, *args, part=part)

    def _device(self) -> torch.device:
        """Return the device of the current site's tensors."""
        if isinstance(self._site, LinearSite):
            return self.store.get(self._site.own.tensor).device
        return self.store.device(self._site.key.module if self._site is not None else "")

    def _redirect(
        self, before: fx.Node, after: fx.Node, take: Callable[[fx.Node], bool], *, narrow: bool = False
    ) -> None:
        """Make the users of ``before`` that ``take`` selects read ``after``, and record the edit.

        This may be called only from within `Seams.write`.
        """
        if after is before:
            return
        before.replace_all_uses_with(
            after, delete_user_cb=lambda u: u is not after and u not in self.emitted and take(u)
        )
        self.program.edits.add(Edit(self.adaptation, self._site_text, before, after, narrow))

    def _read(self, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """Read a value of the model through the seams."""
        return self.seams.read(self, node, kind, site)

    def _write(self, change: Change, put: Callable[..., None]) -> None:
        """Change the model's values through the seams.

        Raises:
            TypeError: if the adaptation's values and the model's differ in dtype. In a sum, a narrower addend is
                widened: the residual stream may be in float32 while the weights are in 16 bits.
        """
        if change.like is not None and change.given:
            mine, theirs = change.given[0].meta["val"].dtype, change.like.meta["val"].dtype
            after = torch.promote_types(mine, theirs) if change.kind == "sum" else mine
            if after != theirs:
                raise TypeError(f"it returns {mine} values to replace {theirs} values")
        self.seams.write(self, change, put)


def size_of(nodes: Nodes, node: fx.Node, axis: int) -> Any:
    """Return the size of an axis: an integer, or a node that computes it."""
    size = expression(node.meta["val"].shape[axis])
    return size if isinstance(size, int) else nodes.call(aten.sym_size.int, node, axis, part="size")


class Seams:
    """The operations of the `Builder` that a composition of adaptations intercepts.

    There are two pairs: an adaptation's tensor is created by `make` and put into the graph by `mix`; a value of the
    model is read with `read` and changed with `write`. All other code is written once, for tensors with and without a
    leading batch axis.

    This class is the trivial case of a single adaptation: every tensor is one tensor, and every value is the model's
    own. A composition is a subclass that may override these four methods and nothing else of the Builder.
    """

    composed: ClassVar[bool] = False
    """Whether several adaptations are built at once."""

    def make(self, nodes: Nodes, new: NewTensor) -> Sequence[str]:
        """Create a tensor of the adaptation.

        Args:
            nodes: the `Nodes` of the adaptation to which the tensor belongs.
            new: the requested tensor.

        Returns:
            The Store names of the created tensors: one, or one for each member.
        """
        return [new.create(new.trainable)]

    def mix(self, nodes: Nodes, new: NewTensor, names: Sequence[str]) -> fx.Node:
        """Return the node that the method receives for a tensor.

        Args:
            nodes: the `Nodes` that insert the calls needed to compute it.
            new: the requested tensor.
            names: the names that `make` returned.
        """
        (name,) = names
        return nodes.cast(nodes.attribute(name, new.part), new.dtype)

    def read(self, nodes: Nodes, node: fx.Node, kind: Reading, site: Site) -> fx.Node:
        """Return a value of the model in the form that the method receives.

        Args:
            nodes: the `Nodes` that insert the calls needed to compute it.
            node: the value in the model's own layout.
            kind: the kind of value.
            site: the site to which the value belongs.
        """
        return node

    def write(self, nodes: Nodes, change: Change, put: Callable[..., None]) -> None:
        """Change values of the model.

        Args:
            nodes: the `Nodes` that insert the calls needed for the change.
            change: the change to make.
            put: a function that makes the change, called with one node for each of ``change.given``.
        """
        put(*change.given)
