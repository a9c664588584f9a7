"""Give an adapter the names of another model that contains the same maps: a language model alone, or one in a wrapper.

The correspondence is found from names and sizes of both models' tensors and proven from their values where both have
any. No model is known by its type.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graftc.files.tensors.weights import weight_files
from graftc.records.conversion import Proof, RenamedMaps
from graftc.runtime.interop.layouts.plain import EXPERT, PlainAdapter
from graftc.runtime.sources.models import load_folder
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import counted, some


class Rule(NamedTuple):
    """Prefixes of paths that stand for each other; either may be empty."""

    old: str
    new: str

    def applied(self, path: str) -> str:
        """Return a path that begins with the old prefix, with the new one."""
        rest = path[len(self.old) :].lstrip(".")
        return f"{self.new}.{rest}" if self.new else rest


def renamed(adapter: PlainAdapter, onto: Path, base: Path | None) -> tuple[PlainAdapter, tuple[RenamedMaps, ...]]:
    """Return an adapter under the names of another model, and how its names have changed.

    Args:
        adapter: the adapter.
        onto: the folder of the model whose names it gets.
        base: the folder of the base that it was trained on, to compare both models' tensors; None if it is not known.

    Raises:
        GraftError: GC069 if the model lacks a map or has several that could be meant, or if the weights of the two
            models differ; GC032 if a model cannot be read.
    """
    new = load_folder(onto, meta=True)
    old = None if base is None else load_folder(base, meta=True)
    modules = {path: _module(path) for path in adapter.updates}
    if old is not None and not set(modules.values()) <= dict(old.named_modules()).keys():
        old = base = None  # the adapter is for the language model of a wrapper that this folder holds
    chosen = _chosen(adapter, modules, new, onto)
    weights = _with_weights(base, onto) if old is not None else None
    rules: dict[str, Rule] = {}
    for old_prefix, (paths, candidates) in chosen.items():
        left = candidates
        if old is not None:
            left = [rule for rule in left if not _other_shapes(rule, [modules[p] for p in paths], old, new)]
        if weights is not None and len(left) > 1:
            left = [rule for rule in left if not any(_differing(rule, [modules[p] for p in paths], *weights))]
        if len(left) != 1:
            raise _undecided(old_prefix, candidates, left, onto, compared=old is not None)
        rules |= dict.fromkeys(paths, left[0])
    proof: Proof = "sizes" if old is None else "shapes"
    if weights is not None:
        _require_equal(rules, modules, *weights)
        proof = "values"
    groups = {rule: [path for path in rules if rules[path] == rule] for rule in dict.fromkeys(rules.values())}
    updates = {rules[path].applied(path): update for path, update in adapter.updates.items()}
    about = {**adapter.about, "base_model_name_or_path": str(onto)}
    about.pop("revision", None)
    made = (RenamedMaps(rule.old, rule.new, len(paths), proof) for rule, paths in groups.items())
    return replace(adapter, updates=updates, about=about), tuple(sorted(made, key=lambda own: -own.maps))


def renamed_keys(values: Mapping[str, Tensor], names: Sequence[RenamedMaps]) -> dict[str, Tensor]:
    """Return values by path, under the new names."""
    rules = sorted((Rule(own.old, own.new) for own in names), key=lambda rule: -len(rule.old))
    result = {}
    for path, value in values.items():
        rule = next(rule for rule in rules if not rule.old or path == rule.old or path.startswith(f"{rule.old}."))
        result[rule.applied(path)] = value
    return result


def _module(path: str) -> str:
    match = EXPERT.fullmatch(path)
    return path if match is None else match["module"]


def _chosen(
    adapter: PlainAdapter, modules: Mapping[str, str], new: nn.Module, onto: Path
) -> dict[str, tuple[list[str], list[Rule]]]:
    """Return, for each old prefix, its paths and the rules that hold for all of them.

    Raises:
        GraftError: GC069 for maps that the model lacks.
    """
    owners = {path: dict(module.named_parameters(recurse=False)) for path, module in new.named_modules()}
    by_end: dict[str, list[str]] = {}
    for path in (path for path, own in owners.items() if own):
        by_end.setdefault(path.rpartition(".")[2], []).append(path)
    found: dict[str, tuple[list[str], list[Rule]]] = {}
    missing = []
    for path, update in adapter.updates.items():
        sizes = None if path != modules[path] else sorted((update.rows, update.down.shape[-1]))
        rules = {}
        for other in by_end.get(modules[path].rpartition(".")[2], ()):
            rule = _rule(modules[path], other)
            weight = owners[other].get("weight")
            if rule is not None and (sizes is None or (weight is not None and sorted(weight.shape) == sizes)):
                rules[rule] = len(rule.old)
        best = [rule for rule, length in rules.items() if length == min(rules.values())]
        if not best:
            missing.append(f"{path} of sizes {sizes}" if sizes else path)
            continue
        paths, candidates = found.setdefault(best[0].old, ([], best))
        paths.append(path)
        candidates[:] = [rule for rule in candidates if rule in best]
        if not candidates:
            missing.append(f"{path} beside {paths[0]}")
    if missing:
        message = f"{onto} has no map for {counted(len(missing), 'map')} of the adapter: {some(missing, 3)}"
        raise GraftError("GC069", message, place=Place(str(onto)), details=tuple(missing[3:30]))
    return found


def _rule(old: str, new: str) -> Rule | None:
    """Return the prefixes that differ; None if one of them has the number of a layer."""
    a, b = old.split("."), new.split(".")
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(a), reversed(b), strict=False)))
    heads = a[: len(a) - same], b[: len(b) - same]
    return None if any(word.isdigit() for head in heads for word in head) else Rule(*map(".".join, heads))


def _other_shapes(rule: Rule, modules: Sequence[str], old: nn.Module, new: nn.Module) -> bool:
    """Return whether a tensor of the adapted maps, or of a module under the prefix, has another shape in the model."""
    theirs = dict(new.named_parameters(remove_duplicate=False))
    return any(
        theirs.get(rule.applied(name), torch.empty(0)).shape != tensor.shape
        for name, tensor in old.named_parameters(remove_duplicate=False)
        if name.rpartition(".")[0] in modules or (rule.old and name.startswith(f"{rule.old}."))
    )


def _with_weights(base: Path | None, onto: Path) -> tuple[nn.Module, nn.Module] | None:
    """Return both models with their weights; None if either folder has only a config."""
    if base is None or any(weight_files(folder) is None for folder in (base, onto)):
        return None
    return load_folder(base), load_folder(onto)


def _differing(rule: Rule, modules: Sequence[str], old: nn.Module, new: nn.Module) -> Iterator[str]:
    for path in modules:
        for name, tensor in old.get_submodule(path).named_parameters(recurse=False):
            other = new.get_parameter(f"{rule.applied(path)}.{name}")
            if not torch.equal(tensor.double(), other.double()):
                yield f"{path}.{name}"


def _require_equal(rules: Mapping[str, Rule], modules: Mapping[str, str], old: nn.Module, new: nn.Module) -> None:
    """Raise if the two models have different weights at the adapted maps.

    Raises:
        GraftError: GC069, which lists the tensors.
    """
    wrong = [name for path, rule in rules.items() for name in _differing(rule, [modules[path]], old, new)]
    if wrong:
        message = f"the models' weights differ at {counted(len(wrong), 'adapted tensor')}: {some(wrong, 3)}"
        hint = (
            "the adapter's update is for the weights that it was trained on: merge it there, or train it on this model"
        )
        raise GraftError("GC069", message, hint=hint, details=tuple(wrong[3:30]))


def _undecided(
    prefix: str, candidates: Sequence[Rule], left: Sequence[Rule], onto: Path, *, compared: bool
) -> GraftError:
    names = some([rule.new or "the model itself" for rule in left or candidates], 5)
    what = f"what begins with {prefix!r}" if prefix else "the adapter's maps"
    if not left:
        message = f"{what} has other tensors than {names} in {onto}"
        return GraftError("GC069", message, hint="name a model that contains the adapter's base")
    message = f"{what} could be {names} in {onto}: names and sizes are the same"
    hint = (
        "the weights are the same, too" if compared else "name the adapter's base, whose weights decide: --model BASE"
    )
    return GraftError("GC069", message, place=Place(str(onto)), hint=hint)
