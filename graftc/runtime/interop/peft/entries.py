"""Build the spec entry that adapts given modules of a base in the same way as a peft config."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from graftc.runtime.interop.peft.base import rows_in
from graftc.runtime.interop.peft.folder import PeftModule
from graftc.runtime.interop.peft.targets import globs
from graftc.specs.foreign.config import AdapterConfig
from graftc.specs.foreign.fields import fields_of


def entry_of(
    config: AdapterConfig, modules: Sequence[PeftModule], paths: Sequence[str], shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Return the entry, with the most common values and with overrides for modules that differ.

    Args:
        config: the config that adapts the modules.
        modules: the adapted modules, at least one.
        paths: paths of all modules of the base.
        shapes: shapes of all parameters of the base, by name.
    """
    _, table = config.format
    varying = sorted({*table.patterns.values(), *(own.field for own in table.lists.values())})
    at = {module.target: tuple(getattr(module.spec, name) for name in varying) for module in modules}
    usual = Counter(at.values()).most_common(1)[0][0]
    entry = {**fields_of(config), **dict(zip(varying, usual, strict=True))}
    if "excess_rank" in type(modules[0].spec).model_fields:
        entry["excess_rank"] = any(_exceeds(module, shapes) for module in modules)
    if "rows" in entry:
        entry["rows"] = rows_in(modules[0].spec)
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
    return {**entry, "target": target, **({"overrides": overrides} if overrides else {})}


def _exceeds(module: PeftModule, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Return whether a module's rank exceeds the largest possible rank of its matrix."""
    shape = shapes.get(module.name, ())
    if len(shape) < 2:
        return False
    matrix = shape[-2:] if module.named else (shape[0], math.prod(shape[1:]))
    return int(getattr(module.spec, "rank", 0)) > min(matrix)
