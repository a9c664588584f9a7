"""The Builder: the only thing that changes a graph.

It inserts nodes where their arguments are ready, creates tensors with an initialiser, keeps ``meta["val"]`` right,
tags every node with its provenance, and records each replacement so that folding can take it back.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.layout import Layout
from graftc.passes.core.ops import SEEDS
from graftc.passes.core.program import Edit, Program, follow, map_nodes, nodes_in, provenance
from graftc.passes.core.rows import Rows
from graftc.passes.core.shapes import fake_mode_of, types_of
from graftc.passes.core.sites import LinearSite, Site, SiteKey
from graftc.passes.core.store import RESERVED, Store
from graftc.specs.diagnostics import GraftError

aten = torch.ops.aten
Initialiser = Callable[[Tensor, torch.Generator], None]
"""Fills a float32 CPU tensor in place, drawing from the generator only."""


class Builder:
    """Builds one adaptation into one Program.

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
        self.overlays: list[tuple[SiteKey, str, Rows, str]] = []
        self._fake = fake_mode_of(program)
        self._values: dict[Any, Any] = {}
        self._attributes: dict[str, fx.Node] = {str(n.target): n for n in program.graph.find_nodes(op="get_attr")}
        self._dropouts: dict[tuple[fx.Node, float, bool], fx.Node] = {}
        self._overlaid: dict[tuple[str, Rows], str] = {}
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

    # ----- nodes

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
        with graph.inserting_after(point):
            node = graph.call_function(target, args, kwargs)
        for source in sources:
            if source.op == "get_attr" and source > node:
                node.prepend(source)
        node.meta = {"val": self._infer(target, args, kwargs), **self._tags(part)}
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

    def _infer(self, target: Any, args: Any, kwargs: Any) -> Any:
        """The call's value from its arguments' types; equal types are worked out once."""
        key = (target, types_of(args), types_of(kwargs))
        if key not in self._values:
            with self._fake:
                inputs = map_nodes((args, kwargs), lambda n: n.meta["val"])
                self._values[key] = target(*inputs[0], **inputs[1])
        return self._values[key]

    def attribute(self, name: str, part: str = "") -> fx.Node:
        """The node that reads a tensor of the Store."""
        known: fx.Node | None = self._attributes.get(name)
        if known is not None:
            return known
        graph = self.program.graph
        with graph.inserting_before(self._first_call()):
            node = graph.get_attr(name)
        tensor = self.store.get(name)
        key = ("tensor", tensor.dtype, tuple(tensor.shape), tensor.device)
        if key not in self._values:
            with self._fake:
                self._values[key] = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        node.meta = {"val": self._values[key], **self._tags(part)}
        self._attributes[name] = node
        return node

    # ----- tensors

    def parameter(
        self,
        part: str,
        shape: tuple[int, ...],
        init: Initialiser,
        *,
        dtype: torch.dtype,
        trainable: bool = True,
    ) -> fx.Node:
        """A tensor of the current site (or of the whole adaptation, outside `on`), created once.

        Args:
            part: its name within the adaptation, as ``"A"``.
            shape: its sizes.
            init: fills a float32 CPU tensor; not called on the meta device.
            dtype: element type it is kept in.
            trainable: False for constants that the method reads.
        """
        key = self._site.key if self._site is not None else None
        name = self._name(part)
        if name not in self.store:
            self.store.add_parameter(name, self._initial(name, shape, init, dtype), trainable=trainable)
        self.parts.setdefault(key, {})[part] = name
        return self.attribute(name, part)

    def _initial(self, name: str, shape: tuple[int, ...], init: Initialiser, dtype: torch.dtype) -> Tensor:
        device = self._device()
        if name in self.values:
            return self._given(name, shape, dtype, device)
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        value = torch.empty(shape)
        init(value, self._generator(name))
        return value.to(device=device, dtype=dtype)

    def _given(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        value = self.values[name]
        if (tuple(value.shape), value.dtype) != (shape, dtype):
            found, wanted = f"{value.dtype}{list(value.shape)}", f"{dtype}{list(shape)}"
            raise GraftError("GC053", f"{name} is {found}, it must be {wanted}")
        return value.detach().to(device, copy=True)

    def tensors(self) -> tuple[str, ...]:
        """Base tensors that the Program reads, in the order of the graph."""
        return tuple(name for name in self._attributes if not self.store.is_adapter(name))

    def read_weight(self, site: LinearSite) -> Tensor:
        """The values of the site's own rows of the base weight, ``[..., rows, in]``: for initialisers."""
        held = self.store.get(site.use.weight).detach()
        return site.rows.take(site.use.layout.orient(held), -2)

    def _name(self, part: str) -> str:
        if self._site is None:
            return f"{RESERVED}.{self.adaptation}.{part}"
        key = self._site.key
        # A module may hold several weights (experts, nn.MultiheadAttention): theirs are told apart by name.
        tensor = key.name if isinstance(self._site, LinearSite) and key.name != "weight" else ""
        segments = [key.module, RESERVED, self.adaptation, tensor, key.part, part]
        return ".".join(s for s in segments if s)

    def _device(self) -> torch.device:
        if isinstance(self._site, LinearSite):
            return self.store.get(self._site.use.weight).device
        return next((t.device for _, t in self.store.base()), torch.device("cpu"))

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def overlay(self, base: str, rows: Rows | None = None) -> fx.Node:
        """Train a copy of ``rows`` of a base tensor in its place; the base is never written.

        Returns the node of the trained tensor. It folds by standing in for the base's rows.
        """
        tensor = self.store.get(base)
        own = rows or Rows(tensor.shape[0] if tensor.dim() else 1)
        known = len(self._overlaid)
        trained = self.trained_rows(base, own)
        current = self._attributes.get(base)
        if len(self._overlaid) > known and current is not None:
            after = own.write(self._emit("overlay"), current, trained, 0, lambda: self._index(own))
            self._redirect(current, after, lambda user: True)
        return trained

    def trained_rows(self, base: str, own: Rows) -> fx.Node:
        """The node of a trained copy of rows of a base tensor. The caller puts it in place wherever they are read."""
        assert self._site is not None
        tensor = self.store.get(base)
        part = base.rpartition(".")[2]
        if (base, own) in self._overlaid:
            return self.attribute(self._overlaid[base, own], part)
        name = self._overlaid[base, own] = self._name(part)
        if name not in self.store:
            value = own.take(tensor.detach())
            if name in self.values:
                value = self._given(name, tuple(value.shape), value.dtype, value.device)
            else:
                value = value.clone()
            self.store.add_parameter(name, value, trainable=True)
            if own.whole:
                self.store.add_overlay(base, name)
        self.parts.setdefault(self._site.key, {})[part] = name
        self._claim(base, own)
        self.overlays.append((self._site.key, base, own, name))
        return self.attribute(name, part)

    def _claim(self, base: str, rows: Rows) -> None:
        """Rows of a base tensor are trained by one adaptation only."""
        claims = self.program.claims.setdefault(base, [])
        for owner, held in claims:
            if held.overlaps(rows):
                raise GraftError(
                    "GC021",
                    f"{self.adaptation!r} and {owner!r} would both train rows {rows} of {base}",
                    hint="leave the tensor out of one of them",
                )
        claims.append((self.adaptation, rows))

    # ----- linear sites

    def input(self, site: LinearSite) -> fx.Node:
        """What the site reads now, in the base's own layout: `map` and `low_rank` know what to make of it."""
        return site.use.input

    def map(self, site: LinearSite, x: fx.Node, weight: fx.Node, part: str = "map") -> fx.Node:
        """``weight: [..., k, in]`` applied to ``x`` as the site applies its own weight: ``[..., k]``."""
        return site.use.map(self.call, x, weight, part)

    def low_rank(self, site: LinearSite, x: fx.Node, a: fx.Node, b: fx.Node, scale: float = 1) -> fx.Node:
        """``scale * (b a) x`` for ``a: [..., rank, in]`` and ``b: [..., rows, rank]``, as ``[..., rows]``."""
        columns = site.columns
        if columns.whole or not site.use.grouped:
            return site.use.low_rank(self.call, x, a, b, scale)
        # Groups are counted over all rows: the others get zeros.
        rank = int(b.meta["val"].shape[-1])
        zeros = self.call(aten.new_zeros.default, b, [columns.total, rank], part="all rows")
        every = columns.write(self._emit("all rows"), zeros, b, 0, lambda: self._index(columns))
        delta = site.use.low_rank(self.call, x, a, every, scale)
        return columns.read(self._emit("own rows"), delta, -1, lambda: self._index(columns))

    def output(self, site: LinearSite) -> fx.Node:
        """The site's own rows of the result so far, ``[..., rows]``."""
        return site.use.columns_last(self.call, self._own(site))

    def _own(self, site: LinearSite) -> fx.Node:
        """The own part of the result, in the base's layout."""
        columns = site.columns
        return columns.read(self._emit("own rows"), site.use.output, site.use.axis, lambda: self._index(columns))

    def set_output(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        """Make ``own`` (``[..., rows]``) the site's result for everything that read it."""
        self._put(site, site.use.columns_home(self.call, own), part)

    def _put(self, site: LinearSite, own: fx.Node, part: str = "") -> None:
        before, columns, axis = site.use.output, site.columns, site.use.axis
        after = columns.write(self._emit(part or "write rows"), before, own, axis, lambda: self._index(columns))
        self._finish(site, before, after)

    def add(self, site: LinearSite, delta: fx.Node, part: str = "add") -> None:
        """Add ``delta`` (``[..., rows]``, or ``[rows]``) to the site's result."""
        if delta.meta["val"].dim() > 1:
            delta = site.use.columns_home(self.call, delta)
            self._put(site, self.call(aten.add.Tensor, self._own(site), delta, part=part))
        else:
            self.set_output(site, self.call(aten.add.Tensor, self.output(site), delta, part=part))

    def _finish(self, site: LinearSite, before: fx.Node, after: fx.Node) -> None:
        mine = str(site.key)
        self._redirect(before, after, lambda user: (provenance(user) or {}).get("site") != mine)
        site.use.output = after

    def set_input(self, site: LinearSite, node: fx.Node) -> None:
        """Make the site, with what is inserted on it so far, read ``node``, which has the input's own layout."""
        before = site.use.input
        mine = str(site.key)
        if site.columns.whole:
            self._redirect(before, node, lambda u: u is site.use.node or (provenance(u) or {}).get("site") == mine)
            return
        own = self.map(site, node, self.weight(site), part="own rows")
        bias = self.bias(site)
        if bias is not None:
            own = self.call(aten.add.Tensor, own, bias, part="own rows")
        self.set_output(site, own)

    def weight(self, site: LinearSite) -> fx.Node:
        """The site's own rows of the weight, ``[..., rows, in]``."""
        node = self._current(site.use.weight)
        if site.use.layout is Layout.COLUMNS:
            node = self.call(aten.transpose.int, node, -2, -1, part="weight")
        elif site.use.layout is Layout.KERNEL:
            node = self.call(aten.flatten.using_ints, node, 1, part="weight")
        return site.rows.read(self._emit("weight rows"), node, -2, lambda: self._index(site.rows))

    def bias(self, site: LinearSite) -> fx.Node | None:
        """The site's own rows of the bias, ``[rows]``; None where there is none."""
        if site.use.bias is None:
            return None
        node = self._current(site.use.bias)
        return site.rows.read(self._emit("bias rows"), node, 0, lambda: self._index(site.rows))

    def _current(self, name: str) -> fx.Node:
        """What stands for a base tensor now: its overlay, where it has one."""
        return follow(self._attributes[name], {edit.before: edit.after for edit in self.program.edits})

    def dropout(self, node: fx.Node, p: float, *, recompute: bool = False) -> fx.Node:
        """Dropout of an activation; sites of one adaptation that read the same input share one mask.

        Args:
            node: what to drop from.
            p: probability of dropping an element; 0 inserts nothing. Indices of a table have nothing to drop.
            recompute: keep a seed instead of the mask for the backward pass (`graftc.passes.core.ops`).
        """
        if p == 0 or not node.meta["val"].is_floating_point():
            return node
        key = (node, p, recompute)
        if key not in self._dropouts:
            if recompute:
                # The seed is drawn beside the activation, so that a recomputed layer keeps its draw.
                like = self.call(aten.new_zeros.default, node, [1], dtype=torch.int64, part="seed")
                seed = self.call(aten.randint_like.low_dtype, like, 0, SEEDS, part="seed")
                dropped = self.call(torch.ops.graftc.seeded_dropout.default, node, seed, p, part="dropout")
            else:
                dropped = self.call(aten.dropout.default, node, p, True, part="dropout")
            self._dropouts[key] = dropped
        return self._dropouts[key]

    def _emit(self, part: str) -> Callable[..., fx.Node]:
        return lambda target, *args: self.call(target, *args, part=part)

    def _index(self, rows: Rows) -> fx.Node:
        """A constant with the numbers of ``rows``; shared by everything that selects the same rows."""
        digest = hashlib.sha256(str(rows.spans).encode()).hexdigest()[:12]
        assert self._site is not None
        name = f"{self._site.key.module}.{RESERVED}.{self.adaptation}.rows_{digest}".lstrip(".")
        if name not in self.store:
            self.store.add_buffer(name, rows.index(self._device()), persistent=False)
        return self.attribute(name, "rows")

    def _redirect(self, before: fx.Node, after: fx.Node, take: Callable[[fx.Node], bool]) -> None:
        if after is before:
            return
        before.replace_all_uses_with(
            after, delete_user_cb=lambda u: u is not after and u not in self._emitted and take(u)
        )
        site = str(self._site.key) if self._site is not None else ""
        self.program.edits.append(Edit(self.adaptation, site, before, after))
