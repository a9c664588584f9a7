"""The part of the `Builder` that makes tensors: parameters, state, and trained copies of the base's."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from graftc.passes.core.build.nodes import Part
from graftc.passes.core.build.seams import Change, NewTensor
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.names import adapter_name
from graftc.passes.core.weights.tensor_edits import EditMode, TensorEdit
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
Initialiser = Callable[[Tensor, torch.Generator], None]
"""Fills a float32 CPU tensor in place, drawing from the generator only."""


@dataclass(frozen=True)
class ParameterStart:
    """How a parameter begins.

    Attributes:
        shape: its sizes.
        init: fills a float32 CPU tensor.
        dtype: the element type that it is kept in.
        trains: whether it trains.
    """

    shape: tuple[int, ...]
    init: Initialiser
    dtype: torch.dtype
    trains: bool


def _is_exact(held: torch.dtype, wanted: torch.dtype) -> bool:
    """Whether a type has every value of another one. Files of earlier releases have 16 bits where there are 32 now."""
    floating = held.is_floating_point and wanted.is_floating_point
    return held == wanted or (floating and torch.promote_types(held, wanted) == wanted)


def tensor_name(site: Site | None, adaptation: str, part: str) -> str:
    """The name of a tensor of an adaptation at a site; or of one that all its sites share."""
    if site is None:
        return adapter_name("", adaptation, part)
    return adapter_name(site.key.module, adaptation, site.scope, site.key.part, part)


class Tensors(Part):
    """Makes the tensors of one adaptation, each once: Programs share them."""

    def _new(self, new: NewTensor) -> fx.Node:
        """The node of a tensor, made through the seam."""
        nodes = self._nodes
        return nodes.seams.mix(nodes, new, nodes.seams.make(nodes, new))

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
            dtype: element type of the node. One of 16 bits is kept as float32 and cast in the graph, unless the spec
                has ``dtype: base``.
            trainable: False for constants that the method reads.
        """

        def create(trains: bool) -> str:
            return self.begin(part, ParameterStart(shape, init, self._nodes.kept_in(dtype), trains))

        return self._new(NewTensor(part, "parameter", create, trainable, dtype=dtype))

    def begin(self, part: str, start: ParameterStart) -> str:
        """A tensor of the current site, created once, without a node; its Store name.

        Args:
            part: its name within the adaptation.
            start: its type and its first value.
        """
        name = self._enter(part)
        if name not in self.store:
            value = self._initial(name, start.shape, start.init, start.dtype)
            self.store.add_parameter(name, value, trainable=start.trains)
            self._nodes.starts[name] = start
        return name

    def trained(self, part: str, value: Callable[[], Tensor], *, dtype: torch.dtype | None = None) -> fx.Node:
        """A trainable tensor of the current site that starts at a value which is worked out, created once.

        Args:
            part: its name within the adaptation, as ``"m"``.
            value: makes its first value, on the site's device; sizes are those for good.
            dtype: element type of the node, as for `parameter`; by default that of the value, which is kept.
        """

        def create(trains: bool) -> str:
            name = self._enter(part)
            if name not in self.store:
                first = value().detach()
                kept = first.dtype if dtype is None else self._nodes.kept_in(dtype)
                self.store.add_parameter(name, self._first(name, first.to(kept, copy=True)), trainable=trains)
            return name

        return self._new(NewTensor(part, "parameter", create, dtype=dtype))

    def _enter(self, part: str) -> str:
        """The Store name of a tensor of the current site, which is entered among the adaptation's."""
        name = self._name(part)
        self.parts.setdefault(self._site.key if self._site is not None else None, {})[part] = name
        return name

    def constant(self, part: str, value: Callable[[], Tensor]) -> fx.Node:
        """A constant of the current site that follows from its rows of the base's weight: worked out once, never kept
        in files. Nothing that is inserted later may train these rows.

        Args:
            part: its name within the adaptation.
            value: makes it, on the site's device.
        """
        return self._new(NewTensor(part, "constant", lambda trains: self._constant(part, value)))

    def _constant(self, part: str, value: Callable[[], Tensor]) -> str:
        name = self._name(part)
        if name not in self.store:
            self.store.add_buffer(name, value().detach(), persistent=False)
        if isinstance(self._site, LinearSite):
            self._edit_tensor(self._site.own, EditMode.CONSTANT)
        return name

    def numbers(self, part: str, value: Tensor) -> fx.Node:
        """A constant of the current site that follows from the architecture alone."""
        return self.constant(part, lambda: value.to(self._device()))

    def buffer(self, part: str, value: Callable[[torch.device], Tensor]) -> fx.Node:
        """State of the current site (or of the whole adaptation, outside `on`), kept with the parameters.

        Args:
            part: its name within the adaptation.
            value: makes its first value on a device; element type and sizes are those for good.
        """
        name = self.keep_buffer(part, value)
        return self.attribute(name, part)

    def keep_buffer(self, part: str, value: Callable[[torch.device], Tensor]) -> str:
        """`buffer` without a node: state that only a controller reads. Returns its Store name."""

        def create(trains: bool) -> str:
            name = self._enter(part)
            if name not in self.store:
                self.store.add_buffer(name, self._first(name, value(self._device())), persistent=True)
            return name

        (name,) = self._nodes.seams.make(self._nodes, NewTensor(part, "state", create))
        return name

    def drawn(self, deployed: fx.Node, low: int, high: int, part: str = "draw") -> fx.Node:
        """A whole number of ``[low, high)``, drawn anew in every forward pass while training; in eval mode it is
        ``deployed``, an ``int64`` buffer of the adaptation."""
        return self.call(aten.randint_like.low_dtype, deployed, low, high, part=part)

    def _initial(self, name: str, shape: tuple[int, ...], init: Initialiser, dtype: torch.dtype) -> Tensor:
        device = self._device()
        if name in self.initial.values:
            return self._given(name, shape, dtype, device)
        if device.type == "meta":
            return torch.empty(shape, dtype=dtype, device=device)
        value = torch.empty(shape)
        init(value, self.generator(name))
        return value.to(device=device, dtype=dtype)

    def _first(self, name: str, own: Tensor) -> Tensor:
        """The value that is given for a tensor, of the type of its own first one; that one where none is given."""
        return self._given(name, tuple(own.shape), own.dtype, own.device) if name in self.initial.values else own

    def _given(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        value = self.initial.values[name]
        if tuple(value.shape) != shape or not _is_exact(value.dtype, dtype):
            found, wanted = f"{value.dtype}{list(value.shape)}", f"{dtype}{list(shape)}"
            raise GraftError("GC053", f"{name} is {found}, it must be {wanted}")
        return value.detach().to(device, dtype, copy=True)

    def held(self, node: fx.Node) -> Tensor:
        """The value that the node of a tensor of the adaptation has now."""
        if node.target is aten.to.dtype:
            return self.held(node.all_input_nodes[0]).to(node.meta["val"].dtype)
        return self.store.get(str(node.target)).detach()

    def tensors(self) -> tuple[str, ...]:
        """Base tensors that the Program reads, in the order of the graph."""
        return tuple(name for name in self._attributes if not self.store.is_adapter(name))

    def read_weight(self, site: LinearSite) -> Tensor:
        """The values of the site's own rows of the base weight, ``[..., rows, in]``: for initialisers."""
        return site.own.operand(self.store.full(site.own.tensor))

    def read_original(self, site: LinearSite) -> Tensor:
        """The same of the weight before it was quantised, for initialisers.

        Raises:
            GraftError: GC167 where it is not known.
        """
        held = self.initial.originals.get(site.own.tensor)
        if held is None:
            message = f"what quantising took from the weight of {site.key} is not known"
            hint = "let the spec quantise the base: base: {quantize: nf4}, or choose another init"
            raise GraftError("GC167", message, hint=hint)
        return site.own.operand(held)

    def _name(self, part: str) -> str:
        return tensor_name(self._site, self.adaptation, part)

    def generator(self, name: str) -> torch.Generator:
        """What random values called ``name`` are drawn from."""
        digest = hashlib.sha256(f"{self.initial.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def every(self, tensor: str) -> WeightSlice:
        """All of a tensor of the Store."""
        return WeightSlice.every(tensor, self.store.get(tensor))

    def overlay(
        self,
        base: str | WeightSlice,
        index: fx.Node | None = None,
        through: Callable[[fx.Node], fx.Node] = lambda trained: trained,
    ) -> fx.Node:
        """Train a copy of a base tensor, or of rows of one, in its place; the base is never written.

        Returns the node of the trained tensor, which has the sizes that the base's rows are stored in. It folds by
        standing in for them. A copy of 16 bits is float32, unless the spec has ``dtype: base``, and what takes the
        base's place is cast.

        Args:
            base: rows of it; all of the tensor that a Store name names.
            index: their numbers, where the graph has them; by default constants of it.
            through: makes what is read in its place of the trained tensor, of the same type. Where the value is
                another, the method folds what has been made of it.
        """
        own = self.every(base) if isinstance(base, str) else base
        is_new = self.program.tensor_edits.copy_of(own.as_stored, self.adaptation) is None
        trained = self.trained_rows(own)
        current = self._attributes.get(own.tensor)
        if is_new and current is not None:
            numbers = index if index is not None else lambda: self.index(own)
            made = self._nodes.cast(through(trained), current.meta["val"].dtype)
            after = own.write(self._emit("overlay"), current, made, numbers)
            self._replace(current, after)
        return trained

    def trained_rows(self, own: WeightSlice) -> fx.Node:
        """The node of a trained copy of rows of a base tensor, in the sizes that they are stored in and at least in
        float32 (see `overlay`). The caller puts it in place wherever they are read."""
        new = NewTensor(own.part, "copy", lambda trains: self._trained_rows(own), base=own.tensor)
        return self._new(new)

    def _trained_rows(self, own: WeightSlice) -> str:
        own, part = own.as_stored, own.part
        known = self.program.tensor_edits.copy_of(own, self.adaptation)
        if known is not None:
            return known
        name = self._enter(part)
        if name not in self.store:
            held = own.take(self.store.get(own.tensor).detach())
            held = held.to(self._nodes.kept_in(held.dtype))
            first = self._first(name, held)
            self.store.add_parameter(name, first.clone() if first is held else first, trainable=True)
        self._edit_tensor(own, EditMode.TRAINED, name)
        return name

    def instead(self, own: WeightSlice, make: Callable[[], fx.Node]) -> None:
        """Put something in place of rows of a base tensor, of which nothing remains.

        Args:
            own: the rows.
            make: gives a node of their type. Where it is `graftc::sparse_weight`, products with it are taken over.

        Raises:
            GraftError: GC021 where another adaptation trains them, or takes them as constants.
        """
        self._edit_tensor(own, EditMode.REPLACED)
        node, current = make(), self._attributes.get(own.tensor)
        if current is not None:
            after = own.write(self._emit("instead"), current, node, lambda: self.index(own))
            self._replace(current, after)

    def known(self, name: str) -> Tensor | None:
        """A tensor of the adaptation by its Store name, if it is there already: made for another Program, or given."""
        return self.store.get(name) if name in self.store else self.initial.values.get(name)

    def stand_in(self, own: WeightSlice, make: Callable[[fx.Node], fx.Node], *, within: bool = False) -> None:
        """Put what is made of a base tensor in its place, wherever it is read. What other adaptations have put there is
        what it is made of.

        Args:
            own: the rows that it is made of.
            make: from the tensor's node to one of the same type, which adds to entries of these rows.
            within: ``make`` has these rows alone.

        Raises:
            GraftError: GC021 where another adaptation trains them in another way, or takes them as constants.
        """
        self._edit_tensor(own, EditMode.ADDED)
        read = self._attributes.get(own.tensor)
        if read is not None:
            current = self.program.current(read)
            changed = self._within(current, make, own) if within else make(current)
            self._replace(current, changed)

    def _replace(self, current: fx.Node, after: fx.Node) -> None:
        """Let everything that reads a base tensor, as it stands now, read ``after``."""
        self._write(Change("tensor", (after,)), lambda node: self._redirect(current, node, lambda user: True))

    def _within(self, tensor: fx.Node, make: Callable[[fx.Node], fx.Node], own: WeightSlice) -> fx.Node:
        part = own.read(self._emit("own rows"), tensor, lambda: self.index(own))
        return own.write(self._emit("write rows"), tensor, make(part), lambda: self.index(own))

    def settled(self, part: str, value: Callable[[torch.Generator], Tensor]) -> tuple[fx.Node, Tensor]:
        """Numbers by which the graph is made: worked out once and kept with the parameters, so that every graph, and
        one that is made from a file, goes by the same ones.

        Args:
            part: their name within the adaptation.
            value: works them out, on the CPU, drawing from the generator only, which depends on the seed and the
                tensor's name; sizes are those for good. On the meta device it is asked for every graph.

        Returns:
            Their node, and the numbers themselves on the CPU.
        """
        name = self._name(part)
        self.keep_buffer(part, lambda device: value(self.generator(name)).to(device))
        self.store.settled.add(name)
        held = self.store.get(name)
        return self.attribute(name, part), value(self.generator(name)) if held.is_meta else held.cpu()

    def _edit_tensor(self, own: WeightSlice, mode: EditMode, trained: str = "") -> None:
        """Enter what the adaptation does with rows of a base tensor; GC021 where another one excludes that."""
        site = self._site.key if self._site is not None else None
        self.program.tensor_edits.add(TensorEdit(self.adaptation, own, mode, site, trained))

    def index(self, own: WeightSlice) -> fx.Node:
        """A constant with the numbers of rows; shared by everything that selects the same ones."""
        digest = hashlib.sha256(str(own.spans).encode()).hexdigest()[:12]
        assert self._site is not None
        name = adapter_name(self._site.key.module, self.adaptation, f"rows_{digest}")

        def create(trains: bool) -> str:
            if name not in self.store:
                self.store.add_buffer(name, own.index(self._device()), persistent=False)
            return name

        return self._new(NewTensor("rows", "constant", create))
