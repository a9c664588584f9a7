"""Determine which parameter each adapter in a file belongs to, by the same rules as peft.

A config may name parameters as well as modules (`target_parameters`), and the file nests a module's adapted parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from graftc.passes.core.grouping import grouped_pairs
from graftc.runtime.interop.peft.targets import meant
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import some
from graftc.specs.foreign.config import AdapterConfig


def meant_parameters(targets: Sequence[str] | None, parameters: Iterable[str]) -> list[str]:
    """Return the parameters that `target_parameters` selects, by path suffixes of whole segments."""
    return [name for name in parameters if any(_means(target, name) for target in targets or ())]


def _means(target: str, name: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapted_parameters(
    config: AdapterConfig, modules: Iterable[tuple[str, int]], place: Place, shapes: Mapping[str, Sequence[int]]
) -> dict[tuple[str, int], tuple[str, bool]]:
    """Return each parameter's name and whether the config names it, by module and depth in the file.

    Args:
        config: the adapter's config.
        modules: the paths and depths in its file.
        place: its file, for errors.
        shapes: shapes of the base's parameters by name, in the base's order; empty if there is no base.

    Raises:
        GraftError: GC113 if the config names more or fewer of a module's parameters than the file has adapters for.
    """
    resolved = dict[tuple[str, int], tuple[str, bool]]()
    targets = config.target_parameters or []
    owned = grouped_pairs((module, last) for module, _, last in (name.rpartition(".") for name in shapes))
    depths = grouped_pairs(modules)
    as_modules = meant(config, list(depths)) if targets else None
    for path, levels in depths.items():
        # Without a base, a bare name may be a parameter of any module, except those that the config names as modules.
        words = [target.rpartition(".")[2] for target in targets]
        known = owned.get(path) or ([] if as_modules and path in as_modules else list(dict.fromkeys(words)))
        names = [name for name in known if any(_means(target, f"{path}.{name}") for target in targets)]
        if not names:
            resolved |= {(path, depth): (_weight(owned.get(path, ()), shapes, path), False) for depth in levels}
            continue
        if not shapes:  # a guess at the module's parameter names; the longest targets are the most specific
            telling = [target.rpartition(".") for target in sorted(targets, key=lambda target: -target.count("."))]
            fitting = [name for around, _, name in telling if not around or f".{path}".endswith(f".{around}")]
            names = list(dict.fromkeys([*fitting, *names]))[: len(levels)]
        if len(names) != len(levels):
            message = (
                f"the file has {len(levels)} adapters at {path}, "
                f"but target_parameters names {len(names)}: {some(names)}"
            )
            raise GraftError("GC113", message, place=place)
        # The first of several parameters is the innermost.
        resolved |= {
            (path, depth): (name, True) for name, depth in zip(names, sorted(levels, reverse=True), strict=True)
        }
    return resolved


def _weight(names: Sequence[str], shapes: Mapping[str, Sequence[int]], path: str) -> str:
    """Return the name of a module's weight: ``weight``, or its only matrix's name if no parameter is called that."""
    if not names or "weight" in names:
        return "weight"
    matrices = [name for name in names if len(shapes[f"{path}.{name}"]) > 1]
    return matrices[0] if len(matrices) == 1 else "weight"
