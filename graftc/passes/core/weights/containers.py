"""Modules of the Store's tree: they have the classes and plain attributes of their sources, but compute nothing."""

from __future__ import annotations

import enum
import functools
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from types import MappingProxyType
from typing import Any, Self, TypeVar

import torch
from torch import nn

from graftc.compat.modules import (
    BUFFERS,
    CHILDREN,
    PARAMETERS,
    STORED_VERSION,
    applied_by,
    buffers_of,
    children_of,
    parameters_of,
    printed_kind,
)
from graftc.passes.core.weights.names import RESERVED
from graftc.passes.core.weights.sharding import is_sharded
from graftc.specs.errors.diagnostics import GraftError, warn

SOURCE = "_source"
"""The name under which the source model's own values are stored for base tensors to which graphs write."""

_OF_THE_SOURCE = frozenset(
    {"__doc__", "__dict__", "__weakref__", "__module__", "__annotations__", "extra_repr", STORED_VERSION}
)
"""Attributes common to all modules that a container nevertheless inherits from its source module's class."""

OWN = "_graftc"
"""The only attribute of a module in the tree that graftc adds."""


_TABLES = (CHILDREN, PARAMETERS, BUFFERS)
"""The attributes in which a module keeps its children and tensors."""

_SHOWN = 3
"""Maximum number of names to print for identical adaptations in a module."""


C = TypeVar("C", bound="Container")
Entry = TypeVar("Entry")


class Tree(nn.Module):
    """A module whose children and tensors may have any name, including those of methods.

    They cannot be removed, and a child can only be replaced by a module that wraps it, because the graphs perform the
    computation of the source's children.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if OWN in vars(self):
            child = children_of(self).get(name)
            if child is not None and value is not child and not _wraps(value, child):
                raise _fixed(self, name)
            if value is None and (parameters_of(self).get(name) is not None or buffers_of(self).get(name) is not None):
                raise _fixed(self, name)
        nn.Module.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        own = vars(self)
        if OWN in own and any(name in own[table] for table in _TABLES):
            raise _fixed(self, name)
        nn.Module.__delattr__(self, name)

    def __repr__(self) -> str:
        return module_text(self)

    def get_submodule(self, target: str) -> nn.Module:
        """Return the module at the path ``target``, whose segments may be method names."""
        module: nn.Module = self
        for segment in target.split(".") if target else ():
            name = printed_kind(module)
            module = _entry(children_of(module), segment, f"{name} has no child {segment!r}")
        return module

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return the parameter called ``target``, whose name may be that of a method."""
        path, _, name = target.rpartition(".")
        return _entry(parameters_of(self.get_submodule(path)), name, f"there is no parameter {target!r}")

    def get_buffer(self, target: str) -> torch.Tensor:
        """Return the buffer called ``target``, whose name may be that of a method."""
        path, _, name = target.rpartition(".")
        return _entry(buffers_of(self.get_submodule(path)), name, f"there is no buffer {target!r}")


def _entry(table: Mapping[str, Entry | None], name: str, message: str) -> Entry:
    entry = table.get(name)
    if entry is None:
        raise AttributeError(message)
    return entry


def additions(module: nn.Module) -> dict[str, nn.Module]:
    """Return the containers of the tensors that adaptations add to this module itself, by adaptation name."""
    reserved = children_of(module).get(RESERVED)
    return (
        {n: c for n, c in children_of(reserved).items() if c is not None and n != SOURCE}
        if reserved is not None
        else {}
    )


Notes = Callable[[str, nn.Module], Iterable[tuple[str, str]]]
"""A function that maps a module's path and the module to its notes: pairs of an adaptation name and a text."""


def tensor_notes(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield each adaptation in a module and a text: its tensors' names and shapes, and how many elements train."""
    for name, added in additions(module).items():
        tensors = [
            f"{part} {list(tensor.shape)}" for part, tensor in (*added.named_parameters(), *added.named_buffers())
        ]
        trains = sum(tensor.numel() for tensor in added.parameters() if tensor.requires_grad)
        yield name, ", ".join([*tensors, f"{trains:,} trainable"])


def module_text(module: nn.Module, notes: Notes = tensor_notes, path: str = "") -> str:
    """Return a tree of modules as torch prints it, with notes on the adaptations in each module.

    Identical neighbours in a list are merged, as in torch, and so are adaptations with the same note on a module.

    Args:
        module: root of the tree.
        notes: a function that returns the notes on a module.
        path: path of the root.
    """
    alike: dict[str, list[str]] = {}
    for name, text in notes(path, module):
        alike.setdefault(text, []).append(name)
    own = module.extra_repr().splitlines()
    lines = [*own, *(f"+ {_named(names)}: {text}" for text, names in alike.items())]
    children: list[tuple[str, str]] = []
    for name, child in children_of(module).items():
        if name != RESERVED:
            below = f"{path}.{name}" if path else name
            children.append((name, module_text(child, notes, below) if isinstance(child, Tree) else repr(child)))
    listed = isinstance(module, nn.ModuleList)
    for _, group in groupby(children, key=lambda child: child[1] if listed else child):
        (first, text), *others = group
        head = f"({first}-{others[-1][0]}): {len(others) + 1} x " if others else f"({first}): "
        lines += (head + text).splitlines()
    kind = printed_kind(module)
    if len(lines) < 2 and lines == own:
        return f"{kind}({''.join(own)})"
    return "\n".join([f"{kind}(", *(f"  {line}" for line in lines), ")"])


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    shown = names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], "...", names[-1]]
    return f"{', '.join(shown)} ({len(names)} alike)"


def _wraps(value: Any, child: nn.Module) -> bool:
    """Return whether a module wraps a child, as the wrappers created by libraries for parallel training do."""
    return isinstance(value, nn.Module) and any(module is child for module in value.modules())


def require_types(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Check that ``fn`` preserves the dtypes of the floating-point tensors in a module.

    Graphs are made for these dtypes, and trained tensors are float32 on purpose.

    Raises:
        GraftError: GC033 if it would change a dtype.
    """
    kinds = {(t.dtype, t.device) for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    for dtype, device in kinds:
        moved = fn(torch.empty(0, dtype=dtype, device=device)).dtype
        if moved != dtype:
            message = f"tensors of {dtype} would become {moved}, but the graphs were made for their current dtypes"
            hint = f"load the base in {moved} and compile it; 'dtype: base' in the spec also trains in that dtype"
            raise GraftError("GC033", message, hint=hint)


def _fixed(module: nn.Module, name: str) -> GraftError:
    message = f"{name} of {printed_kind(module)} cannot be replaced or removed: the graphs depend on it"
    return GraftError("GC043", message, hint="change it in the source model and compile that model")


class Node:
    """The data that graftc stores in a container.

    Attributes:
        constants: attributes of the source module, with the values that are constants in the graphs.
        tell: a function that regenerates code to call hooks where the source module is called; None if there is none.
    """

    constants: Mapping[str, Any] = MappingProxyType({})
    tell: Callable[[], None] | None = None

    def enter(self, module: nn.Module, *inputs: Any) -> Any:
        """Call the container, or a library's wrapper around it, from a graph's code."""
        return module(*inputs)


@dataclass(frozen=True)
class UnitCall:
    """A run of graphs inside the call to an FSDP2 unit, whose hooks gather tensors."""

    run: Callable[[], Any]


def _keeping_types(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor], convert: Callable[[], Any]) -> Any:
    """Convert the tensors in a module; raise GC033 if a dtype would change."""
    require_types(module, fn)
    return convert()


@applied_by(_keeping_types)
class Container(Tree):
    """A node of the Store's tree: it contains tensors and other containers, but computes nothing.

    `like` creates a container whose class also derives from a source module's class, so that ``isinstance``, ``len``
    and indexing work as in the source model.
    """

    _graftc: Node

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._graftc = Node()

    @classmethod
    def like(cls, module: nn.Module) -> Self:
        """Return a container with a module's class, mode and plain attributes, but without its tensors."""
        container: Self = _class_like(cls, _source_class(type(module)))()  # type: ignore[arg-type]
        attributes = plain_attributes(module)
        vars(container).update(attributes)
        container._graftc.constants = module._graftc.constants if isinstance(module, Container) else dict(attributes)
        vars(container)["training"] = module.training
        for table in _TABLES:
            absent = [name for name, entry in getattr(module, table).items() if entry is None]
            getattr(container, table).update(dict.fromkeys(absent))
        return container

    def __init_subclass__(cls, **options: Any) -> None:
        """Skip the ``__init_subclass__`` of source classes, which does not apply to containers."""

    def __setattr__(self, name: str, value: Any) -> None:
        Tree.__setattr__(self, name, value)
        own = vars(self).get(OWN)
        if own is not None and name in own.constants and value != own.constants[name] and not is_silent(self):
            constant(self, name)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Run a `UnitCall`; refuse any other call, since the graphs of the whole model perform a module's computation.

        An FSDP2 unit is called around the graphs, so that its hooks run.

        Raises:
            GraftError: GC043 for any input other than a `UnitCall`.
        """
        if len(inputs) == 1 and isinstance(inputs[0], UnitCall):
            return inputs[0].run()
        raise GraftError("GC043", f"{type(self).__name__} computes nothing by itself", hint="call the compiled model")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Implement `torch.nn.Module.register_parameter`.

        Raises:
            GraftError: GC130 for an adaptation's parameter that is sharded, which tensor parallelism would mistake for
                one of the map's.
        """
        if param is not None and "." in name and is_sharded(param):
            message = f"{name} of {type(self).__name__} cannot be sharded on its own"
            hint = "shard whole layers: fully_shard(block) for each of compiled.blocks.values()"
            raise GraftError("GC130", message, hint=hint)
        nn.Module.register_parameter(self, name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """Implement `torch.nn.Module.register_buffer`, and warn that no graph reads or writes the buffer (GC076).

        A library that uses such a buffer to count a module's operations (thop) would count nothing.
        """
        nn.Module.register_buffer(self, name, tensor, persistent)
        message = f"{name} of {type(self).__name__} will never be updated: the model's graphs run instead of the module"
        hint = "count operators with torch.utils.flop_counter.FlopCounterMode, or count on the source model"
        warn("GC076", message, hint=hint)

    def _no_hook(self, *hook: Any, **_: Any) -> Any:
        if any(_library_of(each) == "deepspeed" for each in hook):
            raise deepspeed()
        name = type(self).__name__
        message = f"a hook on {name} would never be called: the model's graphs run instead of the module"
        raise GraftError("GC043", message, hint="register it on the compiled model, a whole layer or the source model")

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """Implement `torch.nn.Module.register_forward_hook`.

        The hook receives the same values as in the source model, but may not change them. Accessing a value that the
        graph does not compute in that form raises GC043.
        """
        self._tell(hook)
        return nn.Module.register_forward_hook(self, hook, **options)

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        """Register a hook that is called before the module, with the restrictions of `register_forward_hook`."""
        self._tell(hook)
        return nn.Module.register_forward_pre_hook(self, hook, **options)

    def _tell(self, hook: Any) -> None:
        """Regenerate the code so that it calls a hook; FSDP2's hooks are called around all graphs, see `forward`."""
        if of_fsdp(hook):
            return
        if self._graftc.tell is None or _library_of(hook) in _CHANGING:
            self._no_hook(hook)
        else:
            self._graftc.tell()

    register_full_backward_hook = _no_hook
    register_full_backward_pre_hook = _no_hook
    register_backward_hook = _no_hook


_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)


def is_silent(module: nn.Module) -> bool:
    """Return whether a module is a dropout with a probability of zero, which is equivalent to eval mode."""
    return isinstance(module, _DROPOUTS) and module.p == 0


def drops_nothing(module: nn.Module) -> bool:
    """Return whether a module is silent, or has dropouts as direct children, all of which are silent.

    An attention module reads the dropout probability of such a child, but never calls the child.
    """
    own = [child for child in children_of(module).values() if isinstance(child, _DROPOUTS)]
    return is_silent(module) or (bool(own) and all(map(is_silent, own)))


_CHANGING = frozenset({"accelerate", "deepspeed"})
"""Top-level packages whose hooks change a module's computation."""


def _library_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", "")).partition(".")[0]


def of_fsdp(hook: Any) -> bool:
    """Return whether a hook is one of FSDP2's, which gather tensors around a pass and read no values."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


for _name, _value in vars(nn.Module).items():
    # A source class may override methods common to all modules in ways that depend on its own constructor.
    if _name not in vars(Container) and _name not in vars(Tree) and _name not in _OF_THE_SOURCE:
        setattr(Container, _name, _value)


def deepspeed() -> GraftError:
    """Return the error for a model that was passed to DeepSpeed."""
    hint = "train with DDP or FSDP2, which the Trainer and Accelerate start in the same way"
    return GraftError("GC072", "a compiled model cannot be trained with DeepSpeed", hint=hint)


def constant(module: nn.Module, name: str) -> None:
    """Warn that an attribute was set whose value is a constant in the graphs."""
    message = f"{name} of {type(module).__name__} is a constant in the graphs: setting it has no effect"
    warn("GC048", message, hint="set it on the source model and compile that model")


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes with plain values (numbers, strings and the like), which are constants in graphs."""
    return {name: value for name, value in vars(module).items() if _is_plain(name, value)}


def _is_plain(name: str, value: Any) -> bool:
    if name.startswith("_") or name == "training":
        return False
    if isinstance(value, tuple | list):
        return all(_is_plain("", item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | enum.Enum)


def _source_class(cls: type) -> type:
    """Return the class of a source module, even if it is combined with a container's class."""
    return next(c for c in cls.__mro__ if not issubclass(c, Container) and c is not Tree)


@functools.cache
def _class_like(kind: type[C], source: type) -> type[C]:
    """Return a subclass of a container class and a source class; the container class itself if they cannot be."""
    space: dict[str, Any] = {"__module__": source.__module__, "__doc__": source.__doc__}
    if issubclass(source, nn.ModuleList | nn.Sequential):

        def item(self: Any, index: Any) -> Any:
            if not isinstance(index, slice):
                return source.__getitem__(self, index)
            chosen: list[Any] = list(children_of(self).values())[index]
            return nn.Sequential(*chosen) if issubclass(source, nn.Sequential) else nn.ModuleList(chosen)

        space["__getitem__"] = item
    try:
        subclass: type[C] = types.new_class(source.__name__, (kind, source), {}, lambda own: own.update(space))
        subclass()
    except Exception:
        return kind
    return subclass
