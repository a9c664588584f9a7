"""Find the layers of a model that are alike: sibling modules with equal contents."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from graftc.compat.modules import buffers_of, parameters_of
from graftc.compiler.capture.alike.code import LooksElsewhere
from graftc.compiler.capture.identity.capture_key import holdings_of_modules

FEWEST = 4
"""The smallest group of alike layers that is worth the effort: its first and its last layer are traced."""

Place = tuple[str, str]
"""An attribute, identified by its module's path within a layer and its own name."""


@dataclass(eq=False)
class Layer:
    """One of several layers with equal contents.

    Attributes:
        path: the path of its module.
        module: the module itself.
        numbers: its integer attributes, in which it may differ from the others.
        group: this layer and the others, in the order of the model.
    """

    path: str
    module: nn.Module
    numbers: dict[Place, int]
    group: list[Layer] = field(repr=False)

    @property
    def is_last(self) -> bool:
        """Whether this is the last layer of its group."""
        return self.group[-1] is self


def alike(model: nn.Module) -> list[Layer]:
    """Return the layers that have the same contents as others: classes, attribute values and tensor types.

    Only modules with submodules count, and only outside other returned layers. A layer is like no other if it shares
    something with another module, if it contains something that cannot be serialised or a reference to a module that is
    not its own, or if its code may depend on state outside the layer (see `code`).
    """
    if any(count > 1 for count in Counter(id(m) for _, m in model.named_modules(remove_duplicate=False)).values()):
        return []  # the tracer distinguishes the paths of a shared module by how it is reached
    both = (model.named_parameters, model.named_buffers)
    tensors = Counter(id(tensor) for named in both for _, tensor in named(remove_duplicate=False))
    modules = dict(model.named_modules())
    holdings = holdings_of_modules(model)
    elsewhere = LooksElsewhere()
    known = {path: own for path, own in holdings.items() if not (_names_modules(own[2]) or elsewhere.of(modules[path]))}
    repeated: list[Layer] = []
    pending = [("", model)]
    while pending:
        path, module = pending.pop()
        children = [(f"{path}.{name}".lstrip("."), child) for name, child in module.named_children()]
        layers = _among(children, known, tensors) if len(children) >= FEWEST else []
        taken = {id(layer.module) for layer in layers}
        repeated += layers
        pending += [(at, child) for at, child in children if id(child) not in taken]
    return repeated


@dataclass(frozen=True)
class Contents:
    """The contents of a module, which determine together with its arguments what it computes.

    Attributes:
        text: the contents of its modules, without the integers.
        numbers: the integer attributes of its modules.
    """

    text: str
    numbers: Mapping[Place, int]


def contents_of(model: nn.Module, paths: Iterable[str]) -> dict[str, Contents]:
    """Return the contents of modules by path, equal for modules that compute the same if their numbers are equal.

    Left out are modules with contents that cannot be serialised, that refer to modules of which they are not part, or
    whose code may depend on state outside of them (see `code`).
    """
    modules, elsewhere = dict(model.named_modules(remove_duplicate=False)), LooksElsewhere()
    wanted = {path: dict(modules[path].named_modules()) for path in paths}
    holdings = holdings_of_modules(model, {f"{path}.{name}".rstrip(".") for path in wanted for name in wanted[path]})
    contents: dict[str, Contents] = {}
    for path, parts in wanted.items():
        held = {name: holdings.get(f"{path}.{name}".rstrip(".")) for name in parts}
        numbers: dict[Place, int] = {}
        if not any(own is None or _names_modules(own[2:]) or elsewhere.of(parts[name]) for name, own in held.items()):
            described = [_described(name, part, held[name] or (), numbers) for name, part in parts.items()]
            contents[path] = Contents(repr(described), numbers)
    return contents


def _names_modules(contents: Any) -> bool:
    """Return whether a module's contents refer to another module of the model, whose identity its code may check."""
    if not isinstance(contents, list | tuple):
        return False
    return (len(contents) == 2 and contents[0] == "module") or any(map(_names_modules, contents))


def _among(
    modules: Sequence[tuple[str, nn.Module]], contents: Mapping[str, list[Any]], tensors: Mapping[int, int]
) -> list[Layer]:
    groups: dict[str, list[Layer]] = defaultdict(list)
    for path, module in modules:
        parts = [(name, f"{path}.{name}".rstrip("."), part) for name, part in module.named_modules()]
        shared = any(tensors[id(tensor)] > 1 for tensor in (*module.parameters(), *module.buffers()))
        if len(parts) < 2 or shared or "forward" in vars(module) or any(at not in contents for _, at, _ in parts):
            continue
        numbers: dict[Place, int] = {}
        group = groups[repr([_described(name, part, contents[at], numbers) for name, at, part in parts])]
        group.append(Layer(path, module, numbers, group))
    return [layer for group in groups.values() if len(group) >= FEWEST for layer in group]


def _described(name: str, module: nn.Module, contents: Sequence[Any], numbers: dict[Place, int]) -> list[Any]:
    """Return the contents of a module within a layer; integers whose reads can be recorded are moved to ``numbers``."""
    kind, children, values, buffers = contents
    rest: list[Any] = []
    for attribute, value in values:
        number = vars(module)[attribute]
        if type(number) is int and can_be_watched(type(module), attribute):
            numbers[name, attribute] = number
            rest.append(attribute)
        else:
            rest.append([attribute, value])
    tensors = [
        [key, None if t is None else (t.dtype, t.device, tuple(t.shape), t.stride(), t.requires_grad, type(t))]
        for table in (parameters_of(module), buffers_of(module))
        for key, t in table.items()
    ]
    return [name, kind, children, rest, buffers, tensors]


def can_be_watched(kind: type, name: str) -> bool:
    """Return whether every read of an instance's attribute would go through a descriptor of its class."""
    own = [base for base in kind.__mro__ if base not in (object, nn.Module)]
    return not any("__getattribute__" in vars(base) or name in vars(base) for base in own)
