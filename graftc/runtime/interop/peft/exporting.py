"""Export a compiled model to a folder that peft loads, with the same tables and pairs as an import.

Anything that peft cannot express is refused by name before anything is written. The written folder is read back and
compared.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.compat.transformers import path_of
from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.resolver import Resolved
from graftc.compiler.resolve.train import TRAIN
from graftc.files.tensors.writing import save_tensors
from graftc.passes.core.grouping import grouped_pairs
from graftc.passes.core.sites.sites import AttentionSite, EmbeddingSite, LinearSite, Site
from graftc.passes.core.weights.source_lock import source_lock
from graftc.passes.core.weights.weight_slice import Layout
from graftc.records.files import PeftTensor
from graftc.runtime.interop.peft.base import base_of, outermost, paths_of, rows_in, shapes_of
from graftc.runtime.interop.peft.expert_layouts import SINCE
from graftc.runtime.interop.peft.expressible import own_places, refuse_inexpressible, task_of
from graftc.runtime.interop.peft.folder import WEIGHTS, read_peft
from graftc.runtime.interop.peft.groups import written_unlike
from graftc.runtime.interop.peft.pairs import (
    Pair,
    is_listed_at,
    is_parameter,
    pairs_of,
    peft_tensors,
    split,
    table_of,
    table_path,
    trains_rows,
)
from graftc.runtime.interop.peft.targets import suffixes
from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.foreign.config import CONFIG, AdapterConfig, read_config
from graftc.specs.patterns import match_modules
from graftc.specs.peft import PeftFormat

SITES = "graftc_sites.json"
"""The file that lists the site of each tensor, for readers and for recognising folders that graftc wrote."""


@dataclass(frozen=True)
class PeftExport:
    """The contents of a peft folder.

    Attributes:
        config: the contents of ``adapter_config.json``.
        pairs: the pairs of tensors, in the spec's order.
        tensors: peft's tensors, by key.
    """

    config: Mapping[str, Any]
    pairs: Sequence[Pair]
    tensors: Mapping[str, Tensor]

    def sites(self) -> tuple[PeftTensor, ...]:
        """Return a record for each pair."""
        return peft_tensors(self.pairs)


def is_exported(path: Path) -> bool:
    """Return whether a folder is empty or is a peft folder that graftc wrote."""
    return path.is_dir() and ((path / SITES).is_file() or not any(path.iterdir()))


def prepared(compilation: Compilation) -> PeftExport:
    """Return the contents of a peft folder without writing anything.

    Raises:
        GraftError: GC115, which names what peft cannot express.
    """
    main, others = split(compilation)
    refuse_inexpressible(compilation, main, others)
    pairs = pairs_of(compilation)
    config = _config(compilation, main, others)
    if pairs != pairs_of(compilation, older=True):
        # Shapes do not reveal the layout of experts whose weights are square.
        config["peft_version"] = f"{SINCE[0]}.{SINCE[1]}.0"
    _check_sharing(compilation, main, read_config(config, CONFIG, whole=True), pairs)
    tensors = _tensors(compilation, pairs)
    axes = {part: own.axes for part, own in table_of(main.spec).parts.items()}
    for pair in pairs:
        allowed = axes.get(pair.part)
        if allowed is not None and tensors[pair.key].dim() not in allowed:
            raise GraftError("GC115", f"PEFT multiplies {pair.part} differently at {pair.site}", hint="merge it")
    return PeftExport(config, pairs, tensors)


def _check_sharing(compilation: Compilation, main: Resolved, config: AdapterConfig, pairs: Sequence[Pair]) -> None:
    """Raise GC115 if peft would share tensors among other modules than the compiled model does."""
    table = table_of(main.spec)
    sites = {site.key.module: str(site.key) for site, _ in main.places}
    modules = {sites[path]: path for path in paths_of(base_of(compilation)) if path in sites}
    if part := written_unlike(config, table, modules, shapes_of(base_of(compilation)), pairs):
        message = f"PEFT cannot express which modules share {part!r}: it goes by the names in target_modules"
        raise GraftError("GC115", message, hint="adapt all modules of that name, or save the model as an artifact")


def write_peft(export: PeftExport, folder: Path) -> None:
    """Create a folder that peft loads: ``adapter_config.json`` and ``adapter_model.safetensors``."""
    folder.mkdir()
    _write_json(folder / CONFIG, dict(export.config))
    _write_json(folder / SITES, {"format": "peft", "sites": [site.to_json() for site in export.sites()]})
    save_tensors(export.tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    text = json.dumps(data, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8", newline="\n")


def check_peft(export: PeftExport, folder: Path) -> None:
    """Check that reading a folder yields what was written.

    Raises:
        GraftError: GC060 if it does not.
    """
    adapter = read_peft(folder, whole=True)
    same = adapter.shapes.keys() == export.tensors.keys()
    if not same or any(not torch.equal(adapter.tensor(key), value.cpu()) for key, value in export.tensors.items()):
        raise GraftError("GC060", "the folder for PEFT reads back differently from what was written")


def _tensors(compilation: Compilation, pairs: Sequence[Pair]) -> dict[str, Tensor]:
    """Return peft's tensors: separate ones, and shared ones assembled from their parts."""
    tensors: dict[str, Tensor] = {}
    shared: dict[str, list[tuple[Pair, Tensor]]] = {}
    for pair in pairs:
        value = compilation.store.full(pair.tensor)
        if pair.start is None:
            tensors[pair.key] = pair.write(value).contiguous()
        else:
            shared.setdefault(pair.key, []).append((pair, value))
    for key, own in shared.items():
        own.sort(key=lambda item: item[0].start or 0)
        tensors[key] = torch.cat([value for _, value in own], own[0][0].axis)
    return tensors


def _config(compilation: Compilation, main: Resolved, others: Sequence[Resolved]) -> dict[str, Any]:
    table = table_of(main.spec)
    assert table is not None
    source = base_of(compilation)
    name = path_of(getattr(source, "config", None)) or None
    saved = _saved(compilation)
    config: dict[str, Any] = {
        **{"peft_type": table.types[0], "task_type": task_of(compilation, saved), "inference_mode": True},
        **{"base_model_name_or_path": name, "revision": None, "auto_mapping": None},
        # An option that is not set is left out: releases of PEFT that do not have it yet warn about its name.
        **{option: value for option, value in table.fixed.items() if value is not None},
        **dict(table.when),
        **({"modules_to_save": saved} if saved else {}),
    }
    if "ensure_weight_tying" in table.ignored and _trains_tied(compilation):
        config["ensure_weight_tying"] = True
    if table.drawn is not None:
        config[table.drawn] = True
    for name in table.document:
        if value := getattr(compilation.spec, name):
            config[name] = [list(item) for item in value]
    config |= _fields(own_places(compilation, main), main, table)
    if table.joined is not None:
        return config | _virtual(compilation, main)
    return config | _modules(compilation, main, others, table)


def _fields(places: Sequence[tuple[Site, MethodSpec]], main: Resolved, table: PeftFormat) -> dict[str, Any]:
    """Return the config fields that have a counterpart in the spec, with the most common value if sites differ."""
    specs = [spec for _, spec in places]
    fields: dict[str, Any] = {}
    for theirs, ours in table.fields.items():
        value = Counter(repr(getattr(spec, ours)) for spec in specs).most_common(1)[0][0]
        own = next(getattr(spec, ours) for spec in specs if repr(getattr(spec, ours)) == value)
        meanings = table.values.get(theirs)
        if meanings is not None:
            unnamed = table.unnamed.get(theirs, {})
            own = unnamed[own] if own in unnamed else next(word for word, meaning in meanings.items() if meaning == own)
        fields[theirs] = _as_json(own)
    for theirs, derive in table.written.items():
        fields[theirs] = derive(main.spec)
    return {theirs: value for theirs, value in fields.items() if value is not None or theirs not in table.fields}


def _as_json(value: Any) -> Any:
    """Return a spec value as peft writes it.

    Floats without a fractional part become integers, because servers require integers in fields that usually have them.
    """
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return list(value) if isinstance(value, tuple) else value


def _modules(compilation: Compilation, main: Resolved, others: Sequence[Resolved], table: PeftFormat) -> dict[str, Any]:
    """Return the config fields that name the adapted modules and define how they differ."""
    universe = paths_of(base_of(compilation))
    own = own_places(compilation, main)
    plain = [(site, spec) for site, spec in own if not is_parameter(compilation, site)]
    named = [_target(compilation, site) for site, _ in own if is_parameter(compilation, site)]
    paths = [table_path(compilation, site.key) if trains_rows(table) else site.key.module for site, _ in plain]
    listed = [is_listed_at(site, spec, table) for site, spec in plain]
    groups = grouped_pairs(zip(listed, paths, strict=True))
    words = {own: suffixes(dict.fromkeys(modules), universe) for own, modules in groups.items()}
    fields: dict[str, Any] = {"target_modules": sorted({word for each in words.values() for word in each})}
    for theirs in table.lists:
        fields[theirs] = sorted(words.get(True, ()))
    if named:
        fields["target_parameters"] = sorted(suffixes(named, _parameters(compilation)))
    for theirs, ours in table.patterns.items():
        usual = Counter(getattr(spec, ours) for _, spec in own).most_common(1)[0][0]
        fields[theirs] = {
            _target(compilation, site): _as_json(getattr(spec, ours))
            for site, spec in own
            if getattr(spec, ours) != usual
        }
    if others:
        places = [place for other in others for place in other.places]
        fields["trainable_token_indices"] = {table_path(compilation, site.key): rows_in(spec) for site, spec in places}
    maps = [s for s, _ in plain if isinstance(s, LinearSite) and not isinstance(s, EmbeddingSite)]
    if any(site.own.layout is Layout.COLUMNS and not site.leading for site in maps):
        fields |= {"fan_in_fan_out": True} if table.turned else {}
    return fields


def _target(compilation: Compilation, site: Site) -> str:
    """Return the name by which peft selects a site."""
    return f"{site.key.module}.{site.key.name}" if is_parameter(compilation, site) else site.key.module


def _parameters(compilation: Compilation) -> list[str]:
    with source_lock():
        return [name for name, _ in base_of(compilation).named_parameters(remove_duplicate=False)]


def _saved(compilation: Compilation) -> list[str]:
    """Return the shortest unique path suffixes of the outermost modules that train in full."""
    if not compilation.spec.train:
        return []
    paths = [path for path, _ in base_of(compilation).named_modules() if path]
    matched = match_modules(compilation.spec.train, paths)
    return suffixes(outermost(matched), paths)


def _trains_tied(compilation: Compilation) -> bool:
    """Return whether a tensor that several modules share trains in full; by default, peft would give each a copy."""
    copies = {edit.trained: edit.own.tensor for edit in compilation.tensor_edits.copies()}
    trained = (name for names in compilation.parts.get(TRAIN, {}).values() for name in names.values())
    return any(compilation.store.tied(copies[name]) for name in trained)


def _virtual(compilation: Compilation, main: Resolved) -> dict[str, Any]:
    """Return the sizes of the virtual token table."""
    site = main.places[0][0]
    width = next(iter(compilation.parts[main.name][site.key].values()))
    sizes = {"token_dim": int(compilation.store.get(width).shape[-1]), "num_transformer_submodules": 1}
    if isinstance(site, AttentionSite):
        assert site.keys is not None
        sizes |= {"num_layers": len(main.places), "num_attention_heads": sizes["token_dim"] // site.keys.shape[1]}
    return sizes
