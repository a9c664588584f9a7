"""Handle tensors that several modules of a base share, in a peft folder for that base.

peft trains a separate module for each name in `modules_to_save` unless `ensure_weight_tying` is set; it always ties
trained table rows (`trainable_token_indices`) to the model's input embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace

from torch import nn

from graftc.compiler.roles.structure import Structure
from graftc.passes.core.grouping import grouped_pairs
from graftc.runtime.hooks.embeddings import path_by_getter
from graftc.runtime.interop.peft.folder import PeftAdapter, PeftModule, table_form
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError


def once(adapter: PeftAdapter, model: nn.Module, structure: Callable[[], Structure]) -> PeftAdapter:
    """Return the adapter with a single entry for each tied tensor that the file has under several names.

    Table rows get the name by which the model reads the table.

    Raises:
        GraftError: GC112 for an adaptation of a tied tensor that has no equivalent in graftc.
    """
    tied = {name: names for names in _tied_names(model) for name in names}
    if not tied:
        return adapter
    _refuse_shared_factors(adapter, tied)
    return _trained_once(_rows_once(adapter, model, tied, structure), tied)


def _refuse_shared_factors(adapter: PeftAdapter, tied: Mapping[str, list[str]]) -> None:
    """Raise if a table and the head that is tied to it share one pair of factors.

    peft creates such a pair with `ensure_weight_tying`.
    """
    if not adapter.config.value("ensure_weight_tying", False):
        return
    adapted = [module.name for module in adapter.modules if {"A", "B"} & module.keys.keys()]
    for name in adapted:
        if others := [other for other in adapted if other != name and other in tied.get(name, ())]:
            message = f"{name} and {others[0]} share one pair of factors, which has no equivalent here"
            hint = "train the table in full (modules_to_save), or some of its rows (trainable_token_indices)"
            raise GraftError("GC112", message, place=adapter.in_config("ensure_weight_tying"), hint=hint)


def _rows_once(
    adapter: PeftAdapter, model: nn.Module, tied: Mapping[str, list[str]], structure: Callable[[], Structure]
) -> PeftAdapter:
    rows = (m for m in adapter.modules if "weight" in m.keys and table_form(m, "weight") == "rows")
    groups = grouped_pairs((tied[module.name][0], module) for module in rows if module.name in tied)
    changed: dict[int, PeftModule | None] = {}
    doubles = list(adapter.doubles)
    source = path_by_getter(model, "get_input_embeddings")
    for first, group in groups.items():
        beside = group[0].keys["weight"] in adapter.keys.tokens.values()
        main = next((module for module in group if module.path == source), None)
        if beside and (main is None or len(group) > 1):
            others = ", ".join(tied[first])
            message = f"rows of {group[0].name} train separately from tensors that it is tied to: {others}"
            hint = f"PEFT ties the rows of {source} if no others are named" if source else None
            raise GraftError("GC112", message, place=adapter.in_config("trainable_token_indices"), hint=hint)
        main = main or group[0]
        for module in group:
            changed[id(module)] = None
            if module is not main:
                doubles.append((main.keys["weight"], module.keys["weight"]))
        changed[id(main)] = replace(main, read_at=_read(main.path, _modules_of(tied[first]), structure))
    modules = (changed.get(id(module), module) for module in adapter.modules)
    return replace(adapter, modules=tuple(module for module in modules if module is not None), doubles=tuple(doubles))


def _read(path: str, paths: list[str], structure: Callable[[], Structure]) -> str:
    """Return the path of the module through which a table is read.

    An encoder-decoder may also hold the table in a module that is never called.
    """
    tables = {finding.module for finding in structure().findings if finding.kind is SiteKind.EMBEDDING}
    return path if path in tables else next((other for other in paths if other in tables), path)


def _trained_once(adapter: PeftAdapter, tied: Mapping[str, list[str]]) -> PeftAdapter:
    """Return the adapter with a single name for each trained tensor if `ensure_weight_tying` is set.

    The values stored under such a tensor's names must be equal; the first one is used.
    """
    if not adapter.config.value("ensure_weight_tying", False):
        return adapter
    plain, doubles, first = dict(adapter.keys.plain), list(adapter.doubles), dict[str, str]()
    for name, key in adapter.trained.items():
        if name not in tied:
            continue
        if tied[name][0] in first:
            doubles.append((first[tied[name][0]], key))
            del plain[name]
        first.setdefault(tied[name][0], key)
    for name, key in adapter.copies.items():
        if name in tied and tied[name][0] in first:
            doubles.append((first[tied[name][0]], key))
            del plain[name]
    return replace(adapter, keys=replace(adapter.keys, plain=plain), doubles=tuple(doubles))


def trained_together(adapter: PeftAdapter, model: nn.Module) -> list[str]:
    """Return the modules that share a tensor that the adapter trains jointly for all of them."""
    if not adapter.config.value("ensure_weight_tying", False):
        return []
    return [path for _, paths in _shared(adapter.trained, model) for path in paths]


def trained_apart(adapter: PeftAdapter, model: nn.Module) -> list[str]:
    """Return the modules that need their own copy of a shared tensor because they train in full separately."""
    return [] if adapter.config.value("ensure_weight_tying", False) else apart_of(adapter.trained, model)


def apart_of(trained: Collection[str], model: nn.Module) -> list[str]:
    """Return the modules that need their own tensor if each of the named tensors trains separately."""
    untied: list[str] = []
    for own, paths in _shared(trained, model):
        # If all of them train, the first one keeps the shared tensor.
        untied += own[1:] if len(own) == len(paths) else own
    return untied


def _shared(trained: Collection[str], model: nn.Module) -> list[tuple[list[str], list[str]]]:
    """Return, for each shared tensor that trains, the modules that train it and all modules that hold it."""
    shared = [(names, [name for name in names if name in trained]) for names in _tied_names(model)]
    return [(_modules_of(own), _modules_of(names)) for names, own in shared if own]


def _modules_of(names: Iterable[str]) -> list[str]:
    return [name.rpartition(".")[0] for name in names]


def _tied_names(model: nn.Module) -> list[list[str]]:
    """Return the names of each parameter that has several names."""
    names = grouped_pairs((parameter, name) for name, parameter in model.named_parameters(remove_duplicate=False))
    return [own for own in names.values() if len(own) > 1]
