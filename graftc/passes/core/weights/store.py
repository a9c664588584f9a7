"""The Store, the only owner of tensors: a module tree that mirrors the source model.

Programs refer to tensors by name and own none. Base tensors share storage with the source model and are never written;
adapter tensors live under their site's module path, ``<module path>.graftc.<adaptation>.<part>``, or at the root,
``graftc.<adaptation>.<part>``, when several sites share them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

import torch
from torch import nn

from graftc.compat.fsdp import WRAPPED
from graftc.compat.modules import buffers_of, children_of, parameters_of, transient_of
from graftc.passes.core.packing.modules import packed_types
from graftc.passes.core.packing.packed_tensor import PackedTensor, dense
from graftc.passes.core.packing.packing import PackedType, weight_name
from graftc.passes.core.weights.changes import TensorChanges
from graftc.passes.core.weights.containers import OWN, SOURCE, C, Container
from graftc.passes.core.weights.names import RESERVED, adapter_name, parsed
from graftc.passes.core.weights.sharding import gathered
from graftc.passes.core.weights.source_lock import source_lock
from graftc.specs.errors.diagnostics import GraftError


def _adopt(module: nn.Module, old: nn.Module) -> None:
    parameters_of(module).update(parameters_of(old))
    buffers_of(module).update(buffers_of(old))
    transient_of(module).update(transient_of(old))
    children_of(module).update(children_of(old))


def _names(model: nn.Module) -> Iterator[str]:
    """Yield the names of all modules, parameters and buffers of a model."""
    for path, module in model.named_modules(remove_duplicate=False):
        yield path
        yield from (f"{path}.{name}".lstrip(".") for name in (*parameters_of(module), *buffers_of(module)))


class Store:
    """The named tensors of one Compilation.

    Args:
        root: the module whose tree contains the tensors; an empty `Container` by default.

    Attributes:
        aliases: tied names, each mapped to the name that owns the tensor.
        constants: names of tensors to which graphs refer in addition to the source model's own.
        settled: names of persistent buffers whose values determined the graphs, so that other values do not fit.
        updated: names of base tensors to which graphs write, each mapped to the name of the source model's own tensor.
        packed: types of packed weights by name. The tree contains each weight's parts; graphs read the weight.
        companions: objects that belong to the tensors, by name, such as a bank's slots.
        changes: the writes of other threads to the tensors, and the readers that they wait for.
    """

    def __init__(self, root: nn.Module | None = None) -> None:
        self.root: nn.Module = root if root is not None else Container()
        self.aliases: dict[str, str] = {}
        self.constants: set[str] = set()
        self.settled: set[str] = set()
        self.updated: dict[str, str] = {}
        self.packed: dict[str, PackedType] = {}
        self.companions: dict[str, Any] = {}
        self.changes = TensorChanges()

    @classmethod
    def mirror(cls, model: nn.Module) -> Store:
        """Create a Store that mirrors the parameters and buffers of ``model`` and shares their storage.

        Parameters are separate objects with ``requires_grad=False``, so that freezing does not affect the caller's
        model. Tied tensors remain a single tensor: the first name owns it, and the others are recorded in `aliases`
        (alias to owner).

        Raises:
            GraftError: GC030 for a model in which ``graftc`` or ``_graftc`` is used as a name.
        """
        store = cls()
        with source_lock():
            store._take(model)
        return store

    def _take(self, model: nn.Module) -> None:
        taken = [name for name in _names(model) if not {RESERVED, OWN}.isdisjoint(name.split("."))]
        if taken:
            message = f"{type(model).__name__} contains {taken[0]!r}, but {RESERVED!r} and {OWN!r} are reserved names"
            raise GraftError("GC030", message, hint="rename it in the model's code")
        seen: dict[int, tuple[str, torch.Tensor]] = {}
        self.shape(model)
        for path, module in model.named_modules(remove_duplicate=False):
            for name, tensor in (*parameters_of(module).items(), *buffers_of(module).items()):
                if tensor is not None:
                    fqn, persistent = f"{path}.{name}".lstrip("."), name not in transient_of(module)
                    owner, handle = seen.setdefault(id(tensor), (fqn, _handle(tensor)))
                    if owner != fqn:
                        self.aliases[fqn] = owner
                    self._register(fqn, handle, persistent=persistent)
            for name, own in packed_types(module).items():
                self._hold_packed(f"{path}.{name}".lstrip("."), own)

    def _hold_packed(self, name: str, own: PackedType) -> None:
        """Record a packed weight whose parts are registered, as an alias if they are tied to another weight's parts."""
        first = own.names(name)[0]
        if first in self.aliases:
            self.aliases[name] = weight_name(self.aliases[first])
        self.packed[name] = own

    def add_packed(self, name: str, own: PackedType, parts: Iterable[torch.Tensor]) -> None:
        """Add a frozen packed weight; raise `KeyError` when a name is taken."""
        for part, value in zip(own.names(name), parts, strict=True):
            self.add_parameter(part, value, trainable=False)
        self._hold_packed(name, own)

    def parts_of(self, name: str) -> tuple[str, ...]:
        """Return the names under which the tree stores a tensor: its own name, or those of a packed weight's parts."""
        return self.packed[name].names(name) if name in self.packed else (name,)

    @property
    def weight_of(self) -> dict[str, str]:
        """The names of packed weights, by the names of their parts."""
        return {part: name for name in self.packed for part in self.parts_of(name)}

    def shape(self, model: nn.Module) -> None:
        """Create containers below the root that correspond to a model's modules."""
        for path, module in model.named_modules(remove_duplicate=False):
            parent, _, name = path.rpartition(".")
            if path and children_of(self.owner(parent)).get(name) is None:
                children_of(self.owner(parent))[name] = Container.like(module)

    def _register(self, fqn: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
        """Register a tensor under any name, even one that PyTorch refuses because modules have such an attribute."""
        path, _, name = fqn.rpartition(".")
        container = self.container(path)
        if isinstance(tensor, nn.Parameter):
            parameters_of(container)[name] = tensor
            return
        buffers_of(container)[name] = tensor
        (set.discard if persistent else set.add)(transient_of(container), name)

    def container(self, path: str) -> nn.Module:
        """Return the container at ``path``, creating it and those above it if necessary."""
        module, missing = self._reached(path)
        for segment in missing:
            child = children_of(module)[segment] = Container()
            module = child
        return module

    def nearest(self, path: str) -> nn.Module:
        """Return the container at ``path``, or the nearest existing one above it."""
        return self._reached(path)[0]

    def owner(self, path: str) -> nn.Module:
        """Return the container at ``path`` (``""`` is the root); raise `KeyError` if it does not exist."""
        module, missing = self._reached(path)
        if missing:
            raise KeyError(path)
        return module

    def _reached(self, path: str) -> tuple[nn.Module, list[str]]:
        """Return the last existing container along ``path``, and the remaining segments of the path."""
        module, segments = self.root, path.split(".") if path else []
        for number, segment in enumerate(segments):
            child = children_of(module).get(segment)
            if child is None:
                return module, segments[number:]
            module = _unwrapped(child)
        return module, []

    def inside(self, container: nn.Module, name: str) -> nn.Module:
        """Return a container's child with this name, without wrappers around it, or the container if it has none."""
        child = children_of(container).get(name)
        return container if child is None else _unwrapped(child)

    def replace_container(self, path: str, kind: type[C]) -> C:
        """Replace the container at ``path`` with one of another class, which adopts its contents."""
        old = self.owner(path)
        replacement = kind.like(old)
        _adopt(replacement, old)
        parent, _, name = path.rpartition(".")
        children_of(self.owner(parent))[name] = replacement
        return replacement

    def rehome(self, root: nn.Module) -> None:
        """Make ``root`` the root of the tree; it adopts the old root's tensors and containers."""
        _adopt(root, self.root)
        self.root = root

    def __contains__(self, fqn: str) -> bool:
        return fqn in self.packed or self._stored(fqn) is not None

    def get(self, fqn: str) -> torch.Tensor:
        """Return the tensor called ``fqn``, a packed weight as a `PackedTensor`; raise `KeyError` if there is none."""
        if fqn in self.packed:
            own = self.packed[fqn]
            return PackedTensor(own, [self.get(name) for name in own.names(fqn)], gathered)
        tensor = self._stored(fqn)
        if tensor is None:
            raise KeyError(fqn)
        return tensor

    def _stored(self, fqn: str) -> torch.Tensor | None:
        """Return the tensor with this name in the tree; None if there is none."""
        path, _, name = fqn.rpartition(".")
        owner, missing = self._reached(path)
        if missing:
            return None
        parameter = parameters_of(owner).get(name)
        return buffers_of(owner).get(name) if parameter is None else parameter

    def full(self, fqn: str) -> torch.Tensor:
        """Return the full value of the tensor called ``fqn``, detached; raise `KeyError` if there is none.

        If the tensor is sharded across processes, all of them must call this.
        """
        return dense(gathered(self.get(fqn)))

    def is_buffer(self, fqn: str) -> bool:
        """Return whether the tensor called ``fqn`` is a buffer; raise `KeyError` if there is no such tensor."""
        return fqn not in self.packed and not isinstance(self.get(fqn), nn.Parameter)

    def add_parameter(self, fqn: str, tensor: torch.Tensor, *, trainable: bool) -> None:
        """Add an adapter tensor; raise `KeyError` when the name is taken."""
        self.put(fqn, nn.Parameter(tensor, requires_grad=trainable))

    def add_buffer(self, fqn: str, tensor: torch.Tensor, *, persistent: bool) -> None:
        """Add a constant; raise `KeyError` when the name is taken."""
        self.put(fqn, tensor, persistent=persistent)

    def put(self, fqn: str, tensor: torch.Tensor, *, persistent: bool = True) -> None:
        """Add an adapter tensor unchanged, as a parameter or a buffer; raise `KeyError` when the name is taken."""
        if fqn in self:
            raise KeyError(f"{fqn} exists")
        self._register(fqn, tensor, persistent=persistent)

    def drop(self, fqn: str) -> None:
        """Remove an adapter tensor, and any of graftc's containers that this leaves empty.

        Raise `KeyError` if there is no such tensor.
        """
        path, _, name = fqn.rpartition(".")
        owner = self.owner(path)
        (parameters_of(owner) if name in parameters_of(owner) else buffers_of(owner)).pop(name)
        transient_of(owner).discard(name)
        self._drop_empty(path)

    def drop_container(self, path: str) -> None:
        """Remove an empty container of graftc's, and any containers above it that this leaves empty.

        Raise `KeyError` if there is no such container.
        """
        self.owner(path)
        self._drop_empty(path)

    def _drop_empty(self, path: str) -> None:
        while RESERVED in path.split("."):
            owner, (path, _, name) = self.owner(path), path.rpartition(".")
            if parameters_of(owner) or buffers_of(owner) or children_of(owner):
                return
            del children_of(self.owner(path))[name]

    def add_constant(self, fqn: str, tensor: torch.Tensor) -> None:
        """Add a tensor that the source model created during capture; a name that exists is skipped."""
        if fqn not in self:
            self.add_buffer(fqn, tensor, persistent=False)
            self.constants.add(fqn)

    def drop_constant(self, fqn: str) -> None:
        """Remove a tensor that `add_constant` added."""
        path, _, name = fqn.rpartition(".")
        del buffers_of(self.owner(path))[name]
        self.constants.discard(fqn)

    def own(self, name: str, value: torch.Tensor | None = None) -> None:
        """Copy a base tensor to which graphs write, so that the source model's own tensor never changes.

        The source model's tensor remains available under one of graftc's names.

        Args:
            name: any of the tensor's names; nothing happens if the Store owns the tensor already.
            value: the value of the copy; by default, the source model's value.
        """
        name = self.canonical(name)
        if name in self.updated or name in self.constants:
            return
        source = self.get(name)
        self._require_alone(name, source)
        own = (source if value is None else value.to(source)).detach().clone()
        path, _, last = name.rpartition(".")
        self.updated[name] = adapter_name(path, SOURCE, last)
        self._register(self.updated[name], source.detach(), persistent=False)
        self.replace(name, nn.Parameter(own, requires_grad=False) if isinstance(source, nn.Parameter) else own)

    def replace(self, name: str, value: torch.Tensor) -> None:
        """Replace a tensor that the Store owns with another one, under all of its names.

        The previous tensor itself does not change, so existing references remain valid.

        Args:
            name: any of the tensor's names.
            value: the new tensor; a parameter if the previous one is.
        """
        name = self.canonical(name)
        for alias in (name, *self.tied(name)):
            path, _, last = alias.rpartition(".")
            owner = self.owner(path)
            table: dict[str, Any] = parameters_of(owner) if isinstance(value, nn.Parameter) else buffers_of(owner)
            table[last] = value

    def _require_alone(self, name: str, source: torch.Tensor) -> None:
        """Raise GC030 if a tensor shares memory with another, since only one of the two copies would be updated."""
        begin, end = _memory(source)
        for other, tensor in self.base():
            first, last = _memory(tensor)
            if other != name and first < end and begin < last:
                message = f"the model writes to {name}, which shares memory with {other}"
                raise GraftError("GC030", message, hint="give each buffer its own memory")

    def add_like(self, other: Store, name: str, value: torch.Tensor, *, trainable: bool | None = None) -> None:
        """Add a parameter or a buffer, whichever another Store has under this name; by default, equally trainable."""
        own = other.get(name)
        if isinstance(own, nn.Parameter):
            self.add_parameter(name, value, trainable=own.requires_grad if trainable is None else trainable)
        else:
            path, _, last = name.rpartition(".")
            self.add_buffer(name, value, persistent=last not in transient_of(other.owner(path)))

    def alias(self, name: str, owner: str) -> None:
        """Give the tensor called ``owner`` another name."""
        if owner in self.packed:
            self.packed[name], self.aliases[name] = self.packed[owner], owner
            return
        self._register(name, self.get(owner))
        self.aliases[name] = owner

    def canonical(self, fqn: str) -> str:
        """Return the name that owns the tensor called ``fqn``: itself, or the first of its tied names."""
        return self.aliases.get(fqn, fqn)

    def tied(self, fqn: str) -> tuple[str, ...]:
        """Return the other names of the tensor called ``fqn``."""
        owner = self.canonical(fqn)
        names = [owner, *(alias for alias, target in self.aliases.items() if target == owner)]
        return tuple(name for name in names if name != fqn) if len(names) > 1 else ()

    @staticmethod
    def is_adapter(fqn: str) -> bool:
        """Return whether graftc added the tensor called ``fqn``."""
        return parsed(fqn) is not None

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield every name with its tensor, including tied names, in the order of the source model."""
        parameters = self.root.named_parameters(remove_duplicate=False)
        for name, tensor in chain(parameters, self.root.named_buffers(remove_duplicate=False)):
            yield plain(name), tensor

    def base(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield base tensors by owning name (tied names once); for packed weights, their parts."""
        for name, tensor in self.tensors():
            if not self.is_adapter(name) and name not in self.aliases:
                yield name, tensor

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield base tensors as graphs read them, tied names once: like `base`, but packed weights instead of parts."""
        weight_of = self.weight_of
        for name, tensor in self.base():
            weight = weight_of.get(name)
            if weight is None:
                yield name, tensor
            elif name == self.parts_of(weight)[0]:
                yield weight, self.get(weight)

    def device(self, module: str = "") -> torch.device:
        """Return the device of a module's first base tensor, or of the Store's first; ``cpu`` if there are none."""
        for path in dict.fromkeys((module, "")):
            try:
                owner = self.owner(path)
            except KeyError:
                continue
            prefix = f"{path}." if path else ""
            for name, tensor in chain(owner.named_parameters(), owner.named_buffers()):
                if not self.is_adapter(prefix + name):
                    return tensor.device
        return torch.device("cpu")

    def adapters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield the tensors that graftc added, including frozen ones."""
        for name, tensor in self.tensors():
            if self.is_adapter(name):
                yield name, tensor


def _handle(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the same storage: a frozen parameter if ``tensor`` is a parameter."""
    detached = tensor.detach()
    return nn.Parameter(detached, requires_grad=False) if isinstance(tensor, nn.Parameter) else detached


def plain(name: str) -> str:
    """Return a tensor's name without the wrapper modules that libraries have put around its owners."""
    return ".".join(segment for segment in name.split(".") if segment not in WRAPPED) if "._" in f".{name}" else name


def _unwrapped(module: nn.Module) -> nn.Module:
    modules = children_of(module)
    for name in WRAPPED:  # a plain loop for speed, since every lookup in the tree runs it
        if (inner := modules.get(name)) is not None:
            return _unwrapped(inner)
    return module


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    """Return the addresses at which the memory of a tensor's elements begins and ends.

    Both are zero on the meta device, for an empty tensor and for a layout that is not strided.
    """
    if tensor.device.type == "meta" or tensor.layout != torch.strided or not tensor.numel():
        return 0, 0
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
    return tensor.data_ptr(), tensor.data_ptr() + span * tensor.element_size()
