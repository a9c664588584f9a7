"""Modules of the Store's tree, which have the class and the plain attributes of the source's and compute nothing."""

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

from graftc.passes.core.weights.names import RESERVED
from graftc.passes.core.weights.sharding import is_sharded
from graftc.specs.errors.diagnostics import GraftError, warn

SOURCE = "_source"
"""Under which of these the values are that base tensors have in the source model where graphs write to them."""

_OF_THE_SOURCE = frozenset(
    {"__doc__", "__dict__", "__weakref__", "__module__", "__annotations__", "extra_repr", "_version"}
)
"""What a container has from its source module's class, though every module has it."""

OWN = "_graftc"
"""The one attribute of a module in the tree that is graftc's own."""


_SHOWN = 3
"""Up to so many names of adaptations that are alike in a module are written out."""


C = TypeVar("C", bound="Container")


class Tree(nn.Module):
    """A module whose children and tensors may have any name, those of methods as well. None of them can be taken away,
    nor another put in the place of a child: graphs compute what the children of the source do."""

    def __setattr__(self, name: str, value: Any) -> None:
        held = vars(self)
        if OWN in held:
            child = held["_modules"].get(name)
            if child is not None and value is not child and not _wraps(value, child):
                raise _fixed(self, name)
            if value is None and (held["_parameters"].get(name) is not None or held["_buffers"].get(name) is not None):
                raise _fixed(self, name)
        nn.Module.__setattr__(self, name, value)

    def __delattr__(self, name: str) -> None:
        held = vars(self)
        if OWN in held and any(name in held[table] for table in ("_modules", "_parameters", "_buffers")):
            raise _fixed(self, name)
        nn.Module.__delattr__(self, name)

    def __repr__(self) -> str:
        return module_text(self)

    def get_submodule(self, target: str) -> nn.Module:
        """See `torch.nn.Module.get_submodule`."""
        module: nn.Module = self
        for segment in target.split(".") if target else ():
            child = module._modules.get(segment)
            if child is None:
                raise AttributeError(f"{module._get_name()} has no child {segment!r}")  # type: ignore[no-untyped-call]
            module = child
        return module

    def get_parameter(self, target: str) -> nn.Parameter:
        """See `torch.nn.Module.get_parameter`."""
        path, _, name = target.rpartition(".")
        found = self.get_submodule(path)._parameters.get(name)
        if found is None:
            raise AttributeError(f"there is no parameter {target!r}")
        return found

    def get_buffer(self, target: str) -> torch.Tensor:
        """See `torch.nn.Module.get_buffer`."""
        path, _, name = target.rpartition(".")
        found = self.get_submodule(path)._buffers.get(name)
        if found is None:
            raise AttributeError(f"there is no buffer {target!r}")
        return found


def additions(module: nn.Module) -> dict[str, nn.Module]:
    """What adaptations have in a module itself, by their names: containers of their tensors."""
    held = module._modules.get(RESERVED)
    return {n: c for n, c in held._modules.items() if c is not None and n != SOURCE} if held is not None else {}


Notes = Callable[[str, nn.Module], Iterable[tuple[str, str]]]
"""What to say of a module, for its path and itself: names of adaptations, each with a text."""


def tensor_notes(path: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """The names and sizes of the tensors that each adaptation has in a module, and how many elements train."""
    for name, held in additions(module).items():
        tensors = [f"{part} {list(tensor.shape)}" for part, tensor in (*held.named_parameters(), *held.named_buffers())]
        trains = sum(tensor.numel() for tensor in held.parameters() if tensor.requires_grad)
        yield name, ", ".join([*tensors, f"{trains:,} trainable"])


def module_text(module: nn.Module, notes: Notes = tensor_notes, path: str = "") -> str:
    """A tree of modules as torch prints it, with what adaptations have in each. Neighbours in a list that are alike are
    one, as in torch, and so are adaptations that a module has the same of.

    Args:
        module: its root.
        notes: what to say of each module.
        path: of the root.
    """
    alike: dict[str, list[str]] = {}
    for name, text in notes(path, module):
        alike.setdefault(text, []).append(name)
    own = module.extra_repr().splitlines()
    lines = [*own, *(f"+ {_named(names)}: {text}" for text, names in alike.items())]
    children: list[tuple[str, str]] = []
    for name, child in module._modules.items():
        if name != RESERVED:
            below = f"{path}.{name}" if path else name
            children.append((name, module_text(child, notes, below) if isinstance(child, Tree) else repr(child)))
    listed = isinstance(module, nn.ModuleList)
    for _, group in groupby(children, key=lambda child: child[1] if listed else child):
        (first, text), *others = group
        head = f"({first}-{others[-1][0]}): {len(others) + 1} x " if others else f"({first}): "
        lines += (head + text).splitlines()
    kind = module._get_name()  # type: ignore[no-untyped-call]
    if len(lines) < 2 and lines == own:
        return f"{kind}({''.join(own)})"
    return "\n".join([f"{kind}(", *(f"  {line}" for line in lines), ")"])


def _named(names: list[str]) -> str:
    if len(names) == 1:
        return names[0]
    shown = names if len(names) <= _SHOWN else [*names[: _SHOWN - 1], "...", names[-1]]
    return f"{', '.join(shown)} ({len(names)} alike)"


def _wraps(value: Any, child: nn.Module) -> bool:
    """Whether a module is one around a child, as libraries for training in parallel put there."""
    return isinstance(value, nn.Module) and any(module is child for module in value.modules())


def require_types(module: nn.Module, fn: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Refuse what would change the element type of a tensor in a module: graphs are of these types, and what trains is
    float32 for a reason.

    Raises:
        GraftError: GC033.
    """
    held = {(t.dtype, t.device) for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()}
    for dtype, device in held:
        moved = fn(torch.empty(0, dtype=dtype, device=device)).dtype
        if moved != dtype:
            message = f"tensors of {dtype} would become {moved}, and the graphs were made for them as they are"
            hint = f"load the base in {moved} and compile that; with dtype: base in the spec, what trains has its type"
            raise GraftError("GC033", message, hint=hint)


def _fixed(module: nn.Module, name: str) -> GraftError:
    message = f"{name} of {module._get_name()} is a part of the graphs"  # type: ignore[no-untyped-call]
    return GraftError("GC043", message, hint="change it in the source model, and compile that")


class Node:
    """What graftc keeps at a container.

    Attributes:
        constants: attributes that the source module has, with the values that graphs have taken.
        tell: makes code that tells hooks of calls of the source's module; None where there is none.
    """

    constants: Mapping[str, Any] = MappingProxyType({})
    tell: Callable[[], None] | None = None

    def enter(self, module: nn.Module, *inputs: Any) -> Any:
        """Call the container, or what others have put around it, from the code of a graph."""
        return module(*inputs)


@dataclass(frozen=True)
class UnitCall:
    """A run of graphs, around which a module is entered that FSDP2 has made a unit: its hooks gather tensors."""

    run: Callable[[], Any]


class Container(Tree):
    """A node of the Store's tree: holds tensors and containers, computes nothing. `like` makes one whose class is also
    that of a source module, so that ``isinstance``, ``len`` and indices are as they are there."""

    _graftc: Node

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self._graftc = Node()

    @classmethod
    def like(cls, module: nn.Module) -> Self:
        """A container with the class, the mode and the plain attributes of a module, and without its tensors."""
        made: Self = _class_like(cls, _source_class(type(module)))()  # type: ignore[arg-type]
        held = plain_attributes(module)
        vars(made).update(held)
        made._graftc.constants = module._graftc.constants if isinstance(module, Container) else dict(held)
        vars(made)["training"] = module.training
        made._modules.update((name, None) for name, child in module._modules.items() if child is None)
        made._parameters.update((name, None) for name, tensor in module._parameters.items() if tensor is None)
        made._buffers.update((name, None) for name, tensor in module._buffers.items() if tensor is None)
        return made

    def __init_subclass__(cls, **options: Any) -> None:
        """What source classes do with their subclasses is not for containers."""

    def __setattr__(self, name: str, value: Any) -> None:
        Tree.__setattr__(self, name, value)
        own = vars(self).get(OWN)
        if own is not None and name in own.constants and value != own.constants[name] and not is_silent(self):
            constant(self, name)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Any:
        """See `torch.nn.Module`. Raises: GC033 where tensors would become of another type."""
        require_types(self, fn)
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """Refused: what a module computes is a part of the graphs of the whole model. One that FSDP2 has made a unit is
        entered around them, for its hooks: a `UnitCall` is run.

        Raises:
            GraftError: GC043.
        """
        if len(inputs) == 1 and isinstance(inputs[0], UnitCall):
            return inputs[0].run()
        name = type(self).__name__
        raise GraftError("GC043", f"{name} computes nothing by itself", hint="call the compiled model")

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See `torch.nn.Module.register_parameter`.

        Raises:
            GraftError: GC130 for an adaptation's, which tensor parallelism would take for one of the map.
        """
        if param is not None and "." in name and is_sharded(param):
            message = f"{name} of {type(self).__name__} cannot be sharded by itself"
            hint = "shard whole layers: fully_shard(block) for each of compiled.blocks.values()"
            raise GraftError("GC130", message, hint=hint)
        nn.Module.register_parameter(self, name, param)

    def register_buffer(self, name: str, tensor: torch.Tensor | None, persistent: bool = True) -> None:
        """See `torch.nn.Module.register_buffer`. No graph reads or writes a buffer that is put here: what counts in one
        what a module does (thop) is warned that it counts nothing (GC076)."""
        nn.Module.register_buffer(self, name, tensor, persistent)
        message = (
            f"{name} of {type(self).__name__} stays as it is: the graphs of the whole model do what it would count"
        )
        hint = "count operators with torch.utils.flop_counter.FlopCounterMode, or count on the source model"
        warn("GC076", message, hint=hint)

    def _no_hook(self, *hook: Any, **_: Any) -> Any:
        if any(_library_of(each) == "deepspeed" for each in hook):
            raise deepspeed()
        name = type(self).__name__
        message = f"a hook on {name} would never be called: the graphs of the whole model compute what it does"
        raise GraftError("GC043", message, hint="put it on the compiled model, on a whole layer or on the source model")

    def register_forward_hook(self, hook: Any, **options: Any) -> Any:
        """See `torch.nn.Module.register_forward_hook`. The hook gets what it does in the source model, and may not
        change it. What the graph does not have in that form raises GC043 when it is looked into."""
        self._tell(hook)
        return nn.Module.register_forward_hook(self, hook, **options)

    def register_forward_pre_hook(self, hook: Any, **options: Any) -> Any:
        """See `register_forward_hook`."""
        self._tell(hook)
        return nn.Module.register_forward_pre_hook(self, hook, **options)

    def _tell(self, hook: Any) -> None:
        """Have hooks hear of calls; those of FSDP2 are called around all graphs: see `forward`."""
        if of_fsdp(hook):
            return
        if self._graftc.tell is None or _library_of(hook) in _CHANGING:
            self._no_hook(hook)
        else:
            self._graftc.tell()

    register_full_backward_hook = _no_hook
    register_full_backward_pre_hook = _no_hook
    register_backward_hook = _no_hook


def is_silent(module: nn.Module) -> bool:
    """Whether a module is a dropout whose probability has been set to zero, which is the same as its eval mode."""
    return isinstance(module, nn.modules.dropout._DropoutNd) and module.p == 0


def drops_nothing(module: nn.Module) -> bool:
    """Whether a module is silent, or all dropouts are that it has itself: an attention drops probabilities by the
    number of such a child, which it never calls."""
    own = [child for child in module._modules.values() if isinstance(child, nn.modules.dropout._DropoutNd)]
    return is_silent(module) or (bool(own) and all(map(is_silent, own)))


_CHANGING = frozenset({"accelerate", "deepspeed"})
"""Libraries whose hooks make a module compute something else, as one part of a text each."""


def _library_of(hook: Any) -> str:
    return str(getattr(hook, "__module__", "")).partition(".")[0]


def of_fsdp(hook: Any) -> bool:
    """Whether a hook is one of FSDP2's, which gathers tensors around a pass and looks at no values."""
    return str(getattr(hook, "__module__", "")).startswith("torch.distributed.fsdp.")


for _name, _value in vars(nn.Module).items():
    # A source class may override what modules have in common, in ways that need what only its own constructor makes.
    if _name not in vars(Container) and _name not in vars(Tree) and _name not in _OF_THE_SOURCE:
        setattr(Container, _name, _value)


def deepspeed() -> GraftError:
    """The error for a model that DeepSpeed was given."""
    hint = "train with DDP or FSDP2, which the Trainer and Accelerate start in the same way"
    return GraftError("GC072", "a compiled model does not train with DeepSpeed", hint=hint)


def constant(module: nn.Module, name: str) -> None:
    """Warn that an attribute has been set which graphs have taken the value of."""
    message = f"{name} of {type(module).__name__} is a constant of the graphs: setting it changes nothing"
    warn("GC048", message, hint="set it on the source model and compile that")


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Attributes of a module that are numbers, text and the like: graphs have them as constants."""
    return {name: value for name, value in vars(module).items() if _is_plain(name, value)}


def _is_plain(name: str, value: Any) -> bool:
    if name.startswith("_") or name == "training":
        return False
    if isinstance(value, tuple | list):
        return all(_is_plain("", item) for item in value)
    return value is None or isinstance(value, bool | int | float | str | torch.dtype | enum.Enum)


def _source_class(cls: type) -> type:
    """The class of a source module, where it is that of a container as well."""
    return next(c for c in cls.__mro__ if not issubclass(c, Container) and c is not Tree)


@functools.cache
def _class_like(kind: type[C], source: type) -> type[C]:
    """A subclass of a kind of container and of a source class; the kind itself where the two do not go together."""
    space: dict[str, Any] = {"__module__": source.__module__, "__doc__": source.__doc__}
    if issubclass(source, nn.ModuleList | nn.Sequential):

        def item(self: Any, index: Any) -> Any:
            if not isinstance(index, slice):
                return source.__getitem__(self, index)
            chosen = list(self._modules.values())[index]
            return nn.Sequential(*chosen) if issubclass(source, nn.Sequential) else nn.ModuleList(chosen)

        space["__getitem__"] = item
    try:
        found: type[C] = types.new_class(source.__name__, (kind, source), {}, lambda own: own.update(space))
        found()
    except Exception:
        return kind
    return found
