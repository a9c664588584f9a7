"""The entry of a spec that adapts given modules of a base as a config of peft says."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from graftc.runtime.interop.peft.targets import globs
from graftc.specs.base import MethodSpec
from graftc.specs.foreign.config import AdapterConfig
from graftc.specs.foreign.fields import fields_of

__all__ = ["AdaptedModule", "entry_of"]


class AdaptedModule(Protocol):
    """A module that a config adapts."""

    @property
    def path(self) -> str:
        """Of the module in the base."""

    @property
    def target(self) -> str:
        """By what a spec selects it: its path, or the name of the parameter that is adapted where that is not its
        weight."""

    @property
    def name(self) -> str:
        """Of the parameter that is adapted."""

    @property
    def named(self) -> bool:
        """Whether the config names that parameter, and not its module."""

    @property
    def spec(self) -> MethodSpec:
        """The adaptation with what holds there."""


def entry_of(
    config: AdapterConfig, modules: Sequence[AdaptedModule], paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """The entry: what most modules have, and overrides for the others.

    Args:
        config: what they are adapted by.
        modules: one at least.
        paths: of all modules of the base.
        shapes: of all parameters of the base, by name.
    """
    _, table = config.format
    varying = sorted({*table.patterns.values(), *(own.field for own in table.lists.values())})
    at = {module.target: tuple(getattr(module.spec, name) for name in varying) for module in modules}
    usual = Counter(at.values()).most_common(1)[0][0]
    found = {**fields_of(config), **dict(zip(varying, usual, strict=True))}
    if "excess_rank" in type(modules[0].spec).model_fields:
        found["excess_rank"] = any(_exceeds(module, shapes) for module in modules)
    if "rows" in found:
        found["rows"] = list(getattr(modules[0].spec, "rows", None) or ())
    others = dict.fromkeys(values for values in at.values() if values != usual)
    universe = {*at, *(module.path for module in modules)}
    overrides = [
        {
            "modules": globs([target for target, own in at.items() if own == values], universe),
            **{n: v for n, v, u in zip(varying, values, usual, strict=True) if v != u},
        }
        for values in others
    ]
    target = {"modules": globs([module.target for module in modules], [*paths, *shapes]), "expect": len(modules)}
    return {**found, "target": target, **({"overrides": overrides} if overrides else {})}


def _exceeds(module: AdaptedModule, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Whether the rank at a module is above that of any matrix of its size."""
    shape = shapes.get(module.name, ())
    if len(shape) < 2:
        return False
    matrix = shape[-2:] if module.named else (shape[0], math.prod(shape[1:]))
    return int(getattr(module.spec, "rank", 0)) > min(matrix)
