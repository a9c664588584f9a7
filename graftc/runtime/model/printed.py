"""The text of ``print(compiled)``: the source's modules, the adaptations in each, and the trainable parameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import nn

from graftc.compiler.compilation import Compilation
from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.containers import additions, module_text
from graftc.passes.core.weights.names import module_of
from graftc.passes.core.weights.runs import Runs
from graftc.passes.core.weights.store import Store
from graftc.specs.base import MethodSpec
from graftc.specs.errors.text import format_runs


@dataclass
class _Fact:
    """A description of one adaptation in one module.

    Attributes:
        sizes: the sizes that its spec specifies for the module, as text.
        places: descriptions of the places that it adapts in the module, by tensor or role; a tensor's gives its shape.
    """

    sizes: dict[str, None] = field(default_factory=dict)
    places: dict[str, list[str]] = field(default_factory=dict)

    def text(self) -> list[str]:
        """Return the non-empty parts of the description."""
        return [*self.sizes, *(place for places in self.places.values() for place in dict.fromkeys(places))]


def printed(compilation: Compilation, module: nn.Module, trainable: int, total: int) -> str:
    """Return the text of a compiled model; its length and cost are linear in the number of modules and tensors.

    Args:
        compilation: the Compilation, which has the places of adaptations in the first signature.
        module: the compiled model, over the Compilation's Store or a copy of it.
        trainable, total: the number of elements in its trainable parameters and in all of its parameters.
    """
    facts = _facts(compilation)
    methods = compilation.spec.owners
    specs = {item.name: item.spec for item in compilation.main.resolved}
    order = {name: number for number, name in enumerate(methods)}

    def notes(path: str, part: nn.Module) -> Iterator[tuple[str, str]]:
        own, containers = facts.get(path, {}), additions(part)
        for name in sorted({**own, **containers}, key=lambda name: order.get(name, -1)):
            fact = own.get(name) or _shared(specs.get(name))
            method = methods.get(name, name)
            trains = _trains(containers[name]) if name in containers else []
            yield name, ", ".join([*([] if method == name else [method]), *fact.text(), *trains]) or method

    share = 100 * trainable / total if total else 0.0
    names = dict.fromkeys(edit.trained for edit in compilation.tensor_edits.copies())
    parameters = dict(module.named_parameters())
    copied = sum(parameters[name].numel() for name in names if name in parameters and parameters[name].requires_grad)
    of_copies = f", {copied:,} of them in copies of the base's tensors" if copied else ""
    return f"{module_text(module, notes)}\ntrainable parameters: {trainable:,} of {total:,} ({share:.4f}%){of_copies}"


def _facts(compilation: Compilation) -> dict[str, dict[str, _Fact]]:
    """Return the facts by module and adaptation."""
    facts: dict[str, dict[str, _Fact]] = {}
    for item in compilation.main.resolved:
        for site, spec in item.places:
            fact = facts.setdefault(site.key.module, {}).setdefault(item.name, _Fact())
            fact.sizes |= dict.fromkeys(_size(spec))
            name, place = _place(site, compilation.store)
            fact.places.setdefault(name, []).append(place)
    copied: set[tuple[str, str, str]] = set()
    for edit in compilation.tensor_edits.copies():
        owner, own, path = edit.owner, edit.own, module_of(edit.trained)
        places = facts.setdefault(path, {}).setdefault(owner, _Fact()).places
        if (path, owner, own.tensor) not in copied:
            copied.add((path, owner, own.tensor))
            places[own.tensor] = []  # the trained copy is more informative than the adapted place
        places[own.tensor].append(f"{_weight(own.tensor, own.shape, path, own.rows)} (trained copy)")
    return facts


def _shared(spec: MethodSpec | None) -> _Fact:
    """Return the description for tensors that all places of an adaptation share."""
    return _Fact(dict.fromkeys(_size(spec)) if spec is not None else {})


def _size(spec: MethodSpec) -> list[str]:
    size = spec.stated_size()
    if size is None:
        return []
    name, value = size
    return [f"{name.replace('_', ' ')} {list(value) if isinstance(value, tuple) else value}"]


def _place(site: Site, store: Store) -> tuple[str, str]:
    """Return the name of a site's tensor (or else its role), and a description of it."""
    if isinstance(site, LinearSite):
        own = site.own
        return own.tensor, _weight(own.tensor, own.shape, site.key.module, own.rows)
    name = site.weight if isinstance(site, NormSite) else site.tensor if isinstance(site, ParameterSite) else None
    tensor = store.get(name) if name is not None else None
    if name is None or tensor is None:
        role = site.roles[0] if site.roles else str(site.kind)
        return role, role
    return name, _weight(name, tuple(tensor.shape), site.key.module)


def _weight(name: str, shape: tuple[int, ...], path: str, rows: Runs | None = None) -> str:
    """Return a tensor's name within a module (its full name if it belongs to another module) and its stored shape."""
    chosen = "" if rows is None else f" rows {format_runs(rows)}"
    return f"{name.removeprefix(f'{path}.')} {list(shape)}{chosen}"


def _trains(module: nn.Module) -> list[str]:
    parameters = list(module.parameters())
    return [f"{sum(p.numel() for p in parameters if p.requires_grad):,} trainable"] if parameters else []
