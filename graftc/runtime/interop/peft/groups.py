"""Tensors that modules of one kind share: check that peft, which groups modules by its config, shares them likewise."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence

from graftc.passes.core.grouping import grouped_pairs
from graftc.runtime.interop.peft.pairs import Pair
from graftc.specs.foreign.config import AdapterConfig
from graftc.specs.peft import PeftFormat

Shapes = Mapping[str, Sequence[int]]
Sharing = frozenset[frozenset[str]]
"""The sets of modules that share a tensor."""


def shared_unlike(config: AdapterConfig, table: PeftFormat, modules: Sequence[str], shapes: Shapes) -> str:
    """Return a part that peft shares among other modules than graftc does; empty if there is none.

    Args:
        config: the config.
        table: the method's table.
        modules: the adapted modules, in the model's order.
        shapes: the shapes of the model's parameters, by name.
    """
    if table.kind is None:
        return ""
    for part, every in _groups(table).items():
        size = int(config.value(every)) if every else len(modules)
        theirs = _sharing_of_peft(config, modules, shapes, size)
        if theirs is None or theirs != _sharing(table.kind, modules, shapes, size):
            return part
    return ""


def written_unlike(
    config: AdapterConfig, table: PeftFormat, modules: Mapping[str, str], shapes: Shapes, pairs: Sequence[Pair]
) -> str:
    """Return a part that peft would share among other modules than a compiled model does; empty if there is none.

    Args:
        config: the config that is written.
        table: the method's table.
        modules: the adapted modules by their sites' names, in the model's order.
        shapes: the shapes of the model's parameters, by name.
        pairs: the pairs of tensors.
    """
    for part, every in _groups(table).items():
        ours = grouped_pairs((pair.tensor, modules[pair.site]) for pair in pairs if pair.part == part)
        size = int(config.value(every)) if every else len(modules)
        theirs = _sharing_of_peft(config, list(modules.values()), shapes, size)
        if theirs != frozenset(map(frozenset, ours.values())):
            return part
    return ""


def _groups(table: PeftFormat) -> dict[str, str]:
    return {part: own.group for part, own in table.parts.items() if own.group is not None}


def _sharing_of_peft(config: AdapterConfig, modules: Sequence[str], shapes: Shapes, size: int) -> Sharing | None:
    """Return which modules share a tensor in peft; None if several entries of `target_modules` match a module.

    peft takes any one of them.
    """
    named = config.target_modules
    if isinstance(named, str):
        return _sharing(lambda _: "", modules, shapes, size)
    entries = {path: [word for word in named or () if path.endswith(word)] for path in modules}
    if any(len(fitting) != 1 for fitting in entries.values()):
        return None
    return _sharing(lambda path: entries[path][0], modules, shapes, size)


def _sharing(kind: Callable[[str], str], modules: Sequence[str], shapes: Shapes, size: int) -> Sharing:
    keys: list[tuple[Hashable, str]] = [((kind(path), tuple(shapes[f"{path}.weight"])), path) for path in modules]
    groups = grouped_pairs(keys).values()
    return frozenset(frozenset(group[start : start + size]) for group in groups for start in range(0, len(group), size))
