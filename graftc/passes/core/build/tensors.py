"""The part of the `Builder` that creates tensors: parameters, state, and trained copies of base tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, fx

from graftc.passes.core.build.initial import Initialiser, ParameterStart
from graftc.passes.core.build.nodes import Nodes
from graftc.passes.core.build.requests import Change, NewTensor
from graftc.passes.core.sites.sites import LinearSite, Site
from graftc.passes.core.weights.names import adapter_name
from graftc.passes.core.weights.tensor_edits import EditMode, TensorEdit
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten


def _is_exact(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Return whether ``wanted`` can represent every value of ``stored``.

    Some tensors that are now stored in 32 bits have 16 bits in files written by earlier releases.
    """
    floating = stored.is_floating_point and wanted.is_floating_point
    return stored == wanted or (floating and torch.promote_types(stored, wanted) == wanted)


def tensor_name(site: Site | None, adaptation: str, part: str) -> str:
    """Return the Store name of an adaptation's tensor at a site, or at no site if all its sites share the tensor."""
    if site is None:
        return adapter_name("", adaptation, part)
    return adapter_name(site.key.module, adaptation, site.scope, site.key.part, part)


class Tensors(Nodes):
    """The part of the `Builder` that creates an adaptation's tensors, each only once, since Programs share them."""

    def _new(self, new: NewTensor) -> fx.Node:
        """Create a tensor through the seams and return its node."""
        return self.seams.mix(self, new, self.seams.make(self, new))

    def parameter(
        self,
        part: str,
        shape: tuple[int, ...],
        init: Initialiser,
        *,
        dtype: torch.dtype,
        trainable: bool = True,
        owner: Site | None = None,
    ) -> fx.Node:
        """Return the node of a parameter of the current site or, outside `on`, of the whole adaptation; created once.

        Args:
            part: the parameter's name within the adaptation, for example ``"A"``.
            shape: its shape.
            init: a function that fills a float32 CPU tensor with the initial values; not called on the meta device.
            dtype: dtype of the node. A 16-bit parameter is stored as float32 and cast in the graph, unless the spec
                has ``dtype: base``.
            trainable: False for constants that the method reads.
            owner: the site with whose name the tensor is stored, if sites share it; by default the current one. All of
                these sites have the tensor among their parts.
        """

        def create(trains: bool) -> str:
            return self.begin(part, ParameterStart(shape, init, self._kept_in(dtype), trains), owner)

        return self._new(NewTensor(part, "parameter", create, trainable, dtype=dtype))

    def begin(self, part: str, start: ParameterStart, owner: Site | None = None) -> str:
        """Create a tensor of the current site, unless it exists, and return its Store name; no node is inserted.

        Args:
            part: the tensor's name within the adaptation.
            start: its shape, dtype and initial value.
            owner: as for `parameter`.
        """
        name = self._enter(part, owner)
        if name not in self.store:
            start = self._for_slots(part, start)
            value = self._initial(name, start.shape, start.init, start.dtype)
            self.store.add_parameter(name, value, trainable=start.trains)
            self.starts[name] = start
        return name

    def _for_slots(self, part: str, start: ParameterStart) -> ParameterStart:
        """Return the start of a parameter with an axis of slots in front, if it is to have one."""
        if self.slots is None:
            return start
        members, count = self.slots

        def fill(tensor: Tensor, _: torch.Generator) -> None:
            tensor.zero_()
            for slot, member in zip(tensor, members, strict=False):
                start.init(slot, self.generator(tensor_name(self._site, member, part)))

        return replace(start, shape=(count, *start.shape), init=fill)

    def trained(self, part: str, value: Callable[[], Tensor], *, dtype: torch.dtype | None = None) -> fx.Node:
        """Return the node of a trainable tensor of the current site, created once with a computed initial value.

        Args:
            part: the tensor's name within the adaptation, for example ``"m"``.
            value: a function that computes the initial value on the site's device and thereby fixes the shape.
            dtype: dtype of the node; the tensor is stored as by `parameter`. By default, both the node and the stored
                tensor have the value's dtype.
        """

        def create(trains: bool) -> str:
            name = self._enter(part)
            if name not in self.store:
                first = value().detach()
                kept = first.dtype if dtype is None else self._kept_in(dtype)
                self.store.add_parameter(name, self._given_or(name, first.to(kept, copy=True)), trainable=trains)
            return name

        return self._new(NewTensor(part, "parameter", create, dtype=dtype))

    def _enter(self, part: str, owner: Site | None = None) -> str:
        """Record a tensor of the current site among the adaptation's tensors and return its Store name."""
        name = self._name(part) if owner is None else tensor_name(owner, self.adaptation, part)
        self.parts.setdefault(self._site.key if self._site is not None else None, {})[part] = name
        return name

    def constant(self, part: str, value: Callable[[], Tensor]) -> fx.Node:
        """Return the node of a constant derived from the current site's rows of the base weight.

        The constant is computed once and never saved. No adaptation inserted later may train these rows.

        Args:
            part: the constant's name within the adaptation.
            value: a function that computes it on the site's device.
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
        """Return the node of a constant of the current site that depends only on the architecture."""
        return self.constant(part, lambda: value.to(self._device()))

    def buffer(self, part: str, value: Callable[[torch.device], Tensor]) -> fx.Node:
        """Return the node of a state tensor of the current site or, outside `on`, of the whole adaptation.

        The state is saved with the parameters.

        Args:
            part: the state's name within the adaptation.
            value: a function that computes the initial value on a given device and thereby fixes dtype and shape.
        """
        return self.attribute(self.keep_buffer(part, value), part)

    def keep_buffer(self, part: str, value: Callable[[torch.device], Tensor]) -> str:
        """Create state as `buffer` does, but without a node, for use only by a controller; return its Store name."""

        def create(trains: bool) -> str:
            name = self._enter(part)
            if name not in self.store:
                self.store.add_buffer(name, self._given_or(name, value(self._device())), persistent=True)
            return name

        (name,) = self.seams.make(self, NewTensor(part, "state", create))
        return name

    def drawn(self, deployed: fx.Node, low: int, high: int, part: str = "draw") -> fx.Node:
        """Return the node of a random integer in ``[low, high)``.

        In train mode it is redrawn in every forward pass; in eval mode it is ``deployed``, an ``int64`` buffer of the
        adaptation.
        """
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

    def _given_or(self, name: str, own: Tensor) -> Tensor:
        """Return the value supplied for a tensor, cast to the dtype of ``own``, or ``own`` if none was supplied."""
        return self._given(name, tuple(own.shape), own.dtype, own.device) if name in self.initial.values else own

    def _given(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
        value = self.initial.values[name]
        if tuple(value.shape) != shape or not _is_exact(value.dtype, dtype):
            actual, expected = f"{value.dtype}{list(value.shape)}", f"{dtype}{list(shape)}"
            raise GraftError("GC053", f"{name} must be {expected}, got {actual}")
        return value.detach().to(device, dtype, copy=True)

    def current_value(self, node: fx.Node) -> Tensor:
        """Return the current value of the adaptation's tensor that a node reads."""
        if node.target is aten.to.dtype:
            return self.current_value(node.all_input_nodes[0]).to(node.meta["val"].dtype)
        return self.store.get(str(node.target)).detach()

    def own_value(self, part: str) -> Tensor:
        """Return the current value of a tensor of the current site that has been created, for use in initialisers.

        In a bank it is the tensor of the member whose initial value is being computed.
        """
        return self.store.get(self._name(part)).detach()

    def tensors(self) -> tuple[str, ...]:
        """Return the names of the base tensors that the Program reads, in graph order."""
        return tuple(name for name in self._attributes if not self.store.is_adapter(name))

    def read_weight(self, site: LinearSite) -> Tensor:
        """Return the values of the site's own rows of the base weight, ``[..., rows, in]``, for use in initialisers."""
        return site.own.operand(self.store.full(site.own.tensor))

    def _name(self, part: str) -> str:
        return tensor_name(self._site, self.adaptation, part)

    def generator(self, name: str) -> torch.Generator:
        """Return the generator for the random values named ``name``, seeded with `Initial.seed` and the name."""
        digest = hashlib.sha256(f"{self.initial.seed}:{name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def every(self, tensor: str) -> WeightSlice:
        """Return a slice that covers an entire Store tensor."""
        return WeightSlice.every(tensor, self.store.get(tensor))

    def overlay(
        self,
        base: str | WeightSlice,
        index: fx.Node | None = None,
        through: Callable[[fx.Node], fx.Node] = lambda trained: trained,
    ) -> fx.Node:
        """Train a copy of a base tensor, or of some of its rows, instead of the original; the base is never written to.

        Returns the node of the trained tensor, which has the shape in which the base stores the rows. Folding replaces
        the rows with this tensor. A copy of a 16-bit tensor is float32, unless the spec has ``dtype: base``, and is
        cast where it replaces the base's value.

        Args:
            base: the rows of the base tensor, or a Store name for the whole tensor.
            index: a node with the row indices, if the graph has one; by default a constant is added to the graph.
            through: a function that maps the trained tensor to a value of the same shape and dtype, which is read
                instead of the base's rows. If the two differ, the method folds that value.
        """
        own = self.every(base) if isinstance(base, str) else base
        is_new = self.program.tensor_edits.copy_of(own.as_stored, self.adaptation) is None
        trained = self.trained_rows(own)
        current = self._attributes.get(own.tensor)
        if is_new and current is not None:
            numbers = index if index is not None else lambda: self._index(own)
            replacement = self.cast(through(trained), current.meta["val"].dtype)
            self._replace(current, own.write(self._emit("overlay"), current, replacement, numbers))
        return trained

    def trained_rows(self, own: WeightSlice) -> fx.Node:
        """Return the node of a trained copy of some rows of a base tensor.

        The copy has the shape in which the rows are stored and is at least float32 (see `overlay`). The caller
        substitutes it wherever the rows are read.
        """
        return self._new(NewTensor(own.part, "copy", lambda trains: self._trained_rows(own), base=own.tensor))

    def _trained_rows(self, own: WeightSlice) -> str:
        own, part = own.as_stored, own.part
        known = self.program.tensor_edits.copy_of(own, self.adaptation)
        if known is not None:
            return known
        name = self._enter(part)
        if name not in self.store:
            rows = own.take(self.store.get(own.tensor).detach())
            rows = rows.to(self._kept_in(rows.dtype))
            first = self._given_or(name, rows)
            self.store.add_parameter(name, first.clone() if first is rows else first, trainable=True)
        self._edit_tensor(own, EditMode.TRAINED, name)
        return name

    def instead(self, own: WeightSlice, make: Callable[[], fx.Node]) -> None:
        """Replace rows of a base tensor completely.

        Args:
            own: the rows.
            make: a function that returns a node of the same shape and dtype. If it calls `graftc::sparse_weight`,
                products with the node are replaced as well.

        Raises:
            GraftError: GC021 if another adaptation trains the rows or uses them as constants.
        """
        self._edit_tensor(own, EditMode.REPLACED)
        node, current = make(), self._attributes.get(own.tensor)
        if current is not None:
            self._replace(current, self._with_rows(own, current, node, "instead"))

    def known(self, name: str) -> Tensor | None:
        """Return the adaptation's tensor ``name`` if it was created for another Program or supplied, otherwise None."""
        return self.store.get(name) if name in self.store else self.initial.values.get(name)

    def stand_in(self, own: WeightSlice, make: Callable[[fx.Node], fx.Node], *, within: bool = False) -> None:
        """Replace a base tensor, wherever it is read, with a value computed from it.

        The computation starts from the tensor's current form, including other adaptations' replacements.

        Args:
            own: the rows that the replacement changes.
            make: a function that receives the tensor's node, adds to entries of these rows, and returns a node of the
                same shape and dtype.
            within: whether ``make`` receives only these rows.

        Raises:
            GraftError: GC021 if another adaptation trains the rows in a different way or uses them as constants.
        """
        self._edit_tensor(own, EditMode.ADDED)
        read = self._attributes.get(own.tensor)
        if read is not None:
            current = self.program.current(read)
            if within:
                changed = self._with_rows(own, current, make(self._rows(own, current, "own rows")), "write rows")
            else:
                changed = make(current)
            self._replace(current, changed)

    def _replace(self, current: fx.Node, after: fx.Node) -> None:
        """Make everything that reads the current form of a base tensor read ``after``."""
        self._write(Change("tensor", (after,)), lambda node: self._redirect(current, node, lambda user: True))

    def _rows(self, own: WeightSlice, node: fx.Node, part: str, axis: int | None = None) -> fx.Node:
        """Return the rows of a value that a slice selects along an axis; see `WeightSlice.read`."""
        return own.read(self._emit(part), node, lambda: self._index(own), axis)

    def _with_rows(self, own: WeightSlice, node: fx.Node, rows: fx.Node, part: str, axis: int | None = None) -> fx.Node:
        """Return a value in which ``rows`` replaces the rows that `_rows` selects; see `WeightSlice.write`."""
        return own.write(self._emit(part), node, rows, lambda: self._index(own), axis)

    def settled(self, part: str, value: Callable[[torch.Generator], Tensor]) -> tuple[fx.Node, Tensor]:
        """Return values that determine how the graph is built.

        They are computed once and saved with the parameters, so that every graph, including one built from a file,
        uses the same values.

        Args:
            part: the tensor's name within the adaptation.
            value: a function that computes the values on the CPU and thereby fixes the shape. It draws only from the
                generator, which is seeded with `Initial.seed` and the tensor's name. On the meta device, it is called
                for every graph.

        Returns:
            Their node, and the values themselves on the CPU.
        """
        name = self._name(part)
        self.keep_buffer(part, lambda device: value(self.generator(name)).to(device))
        self.store.settled.add(name)
        numbers = self.store.get(name)
        return self.attribute(name, part), value(self.generator(name)) if numbers.is_meta else numbers.cpu()

    def _edit_tensor(self, own: WeightSlice, mode: EditMode, trained: str = "") -> None:
        """Record how the adaptation uses rows of a base tensor; raise GC021 if another adaptation conflicts."""
        site = self._site.key if self._site is not None else None
        self.program.tensor_edits.add(TensorEdit(self.adaptation, own, mode, site, trained))

    def _index(self, own: WeightSlice) -> fx.Node:
        """Return the node of a constant with row indices, shared by all code that selects the same rows."""
        digest = hashlib.sha256(str(own.spans).encode()).hexdigest()[:12]
        assert self._site is not None
        name = adapter_name(self._site.key.module, self.adaptation, f"rows_{digest}")

        def create(trains: bool) -> str:
            if name not in self.store:
                self.store.add_buffer(name, own.index(self._device()), persistent=False)
            return name

        return self._new(NewTensor("rows", "constant", create))
