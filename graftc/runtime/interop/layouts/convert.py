"""Convert adapter folders between layouts, and probe the written files to check that the updates are unchanged."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graftc.files.writing import check_apart, staged_or_dropped
from graftc.records.conversion import ConvertedSite, RenamedMaps
from graftc.runtime.interop.layouts.base_checks import require_fitting, require_usual_experts
from graftc.runtime.interop.layouts.folder import detected, read_layout, write_layout
from graftc.runtime.interop.layouts.fusing import FUSED, joined, split
from graftc.runtime.interop.layouts.layout import AdapterLayout, layout_of
from graftc.runtime.interop.layouts.plain import AttentionSizes, PlainAdapter, concatenated
from graftc.runtime.interop.layouts.reference import responses
from graftc.runtime.interop.layouts.renaming import renamed, renamed_keys
from graftc.runtime.interop.peft.folder import WEIGHTS, adapter_tensors
from graftc.runtime.serving.engines import ENGINES
from graftc.runtime.serving.limits import require_served
from graftc.runtime.sources.folder_kinds import missing, reader_of
from graftc.runtime.sources.models import local_config
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import some
from graftc.specs.foreign.config import CONFIG, MOST, config_bytes, read_config
from graftc.specs.regular_files import read_regular
from graftc.specs.strict_json import read_json

PROBES = 4
ROUNDING: Mapping[torch.dtype, float] = {torch.float32: 1e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}
"""Allowed relative error, by the factors' dtype, for an update with a factor that was rescaled and so rounded again."""
_EXACT = 1e-12


@dataclass(frozen=True)
class ConvertedFolder:
    """The result of a conversion.

    Attributes:
        out: the written folder; None if nothing was written.
        source: name of the source layout.
        target: name of the target layout.
        sites: all maps, with the measured errors.
        rank: the largest rank written.
        renamed: the maps with the names of another model.
    """

    out: Path | None
    source: str
    target: str
    sites: tuple[ConvertedSite, ...]
    rank: int
    renamed: tuple[RenamedMaps, ...] = ()

    @property
    def largest_error(self) -> float:
        """The largest error over all maps."""
        return max((probed.error for probed in self.sites), default=0.0)


def is_adapter_folder(path: Path) -> bool:
    """Return whether a folder contains both of PEFT's files."""
    return (path / CONFIG).is_file() and (path / WEIGHTS).is_file()


def convert_folder(
    origin: AdapterSource,
    out: Path | None,
    to: str = "peft",
    *,
    join: Sequence[str] = (),
    apart: Sequence[str] = (),
    onto: Path | None = None,
    force: bool = False,
) -> ConvertedFolder:
    """Convert adapter folders, and check the written files before they appear at the destination.

    Args:
        origin: the source to read.
        out: the folder to write; None to check the conversion only.
        to: name of the target layout.
        join: groups of maps to fuse into one: ``"qkv"``, ``"gate_up"``.
        apart: groups to split into their parts.
        onto: the folder of another model that contains the adapted maps, whose names they get.
        force: whether to replace an existing adapter folder.

    Raises:
        GraftError: GC067 if the written adapter computes a different update, GC069 for content that a layout cannot
            store, GC110 to GC113 for a folder that cannot be read, GC063 and GC064 for the destination.
    """
    if out is not None:
        check_apart(out, *origin.read_from, onto)
    target = layout_of(to)
    for word in (*join, *apart):
        if word not in FUSED:
            raise GraftError("GC069", f"nothing is fused as {word!r}", hint=f"use one of: {', '.join(FUSED)}")
    adapter, wanted = origin.read(join, apart)
    if origin.base is not None and (origin.given or len(origin.folders) > 1) and not (join or apart):
        require_fitting(adapter, origin.base)
    require_usual_experts(adapter, (origin.layout, target), origin.base)
    names: tuple[RenamedMaps, ...] = ()
    if onto is not None:
        adapter, names = renamed(adapter, onto, origin.base)
        wanted = renamed_keys(wanted, names)
    place = staged_or_dropped(out, "adapter", force=force, replaceable=is_adapter_folder, sources=origin.folders)
    with place as staging:
        return replace(_written(adapter, target, staging, wanted, origin), out=out, renamed=names)


@dataclass(frozen=True)
class AdapterSource:
    """The input of a conversion.

    Attributes:
        folders: adapter folders that share one layout and one base; their updates are added up.
        layout: the layout of the folders.
        base: the base's folder, or a folder with only its config; None if neither is available.
        heads: the base's attention sizes, if its config defines them.
        given: whether the base was named by the caller rather than by the adapter's config.
    """

    folders: tuple[Path, ...]
    layout: AdapterLayout
    base: Path | None
    heads: AttentionSizes | None
    given: bool = False

    @classmethod
    def of(
        cls, folder: Path, layout: str | None = None, add: Sequence[Path] = (), model: Path | None = None
    ) -> AdapterSource:
        """Return the source that consists of the given folders.

        Args:
            folder: the first folder.
            layout: name of the layout; by default the one that the keys imply. Unsloth's must be named explicitly.
            add: more folders with the same layout and base.
            model: the base's folder, whose config is needed for experts and for anything that depends on heads. By
                default, the base that the adapter's config names, if it is a folder or in the hub's cache.

        Raises:
            GraftError: GC069 for folders with different bases or layouts, GC073 for one that is named twice, GC110 to
                GC113 for one that cannot be read.
        """
        folders = (folder, *add)
        _require_different(folders)
        _require_readable(folders)
        source_layout = layout_of(layout) if layout is not None else detected(folder)
        configs, given = [_config(path) for path in folders], model is not None
        if not given:
            _require_one_base(folders, configs)
        base = _base(configs[0], model)
        return cls(folders, source_layout, base, None if base is None else _heads(base, required=given), given)

    @property
    def read_from(self) -> tuple[Path, ...]:
        """The folders that the caller named: those of the adapter, and the base's."""
        return (*self.folders, self.base) if self.given and self.base is not None else self.folders

    def read(self, join: Sequence[str] = (), apart: Sequence[str] = ()) -> tuple[PlainAdapter, dict[str, Tensor]]:
        """Return one adapter with the updates of all folders, and the responses that the reference computes."""
        adapter = reduce(concatenated, self._parts)
        for word in apart:
            adapter = split(adapter, word, self.heads)
        for word in join:
            adapter = joined(adapter, word, self.heads)
        wanted: dict[str, Tensor] = {}
        for path in self.folders:
            for site, value in responses(self.layout, _tensors(path), _config(path), self.probe, self.heads).items():
                wanted[site] = wanted[site] + value if site in wanted else value
        return adapter, wanted

    @cached_property
    def _parts(self) -> list[PlainAdapter]:
        return [read_layout(path, self.layout, self.heads) for path in self.folders]

    @property
    def rounded(self) -> bool:
        """Whether a factor may be converted to another scale or dtype, and so rounded again."""
        return len({(u.scale, u.up.dtype) for part in self._parts for u in part.updates.values()}) > 1

    @staticmethod
    def probe(size: int) -> Tensor:
        """Return random float64 inputs ``[size, probes]``, always the same for a given size."""
        return torch.randn(size, PROBES, generator=torch.Generator().manual_seed(size), dtype=torch.float64)


def _written(
    adapter: PlainAdapter, target: AdapterLayout, folder: Path, wanted: Mapping[str, Tensor], source: AdapterSource
) -> ConvertedFolder:
    write_layout(adapter, target, folder, source.heads)
    tensors, config = _tensors(folder), _config(folder)
    if target.name in ENGINES:
        require_served(ENGINES[target.name], config, tensors)
    written = responses(target, tensors, config, source.probe, source.heads)
    dtypes = {tensor.dtype for tensor in tensors.values()}
    allowed = max((ROUNDING.get(dtype, _EXACT) for dtype in dtypes), default=_EXACT) if source.rounded else _EXACT
    maps = compared(wanted, written, allowed)
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    return ConvertedFolder(None, source.layout.name, target.name, maps, rank)


def compared(wanted: Mapping[str, Tensor], actual: Mapping[str, Tensor], allowed: float) -> tuple[ConvertedSite, ...]:
    """Return the error of every map that occurs on either side; each side may fuse maps that the other keeps separate.

    Raises:
        GraftError: GC067, which names the maps that differ.
    """
    wanted, actual = _level(wanted, actual), _level(actual, wanted)
    maps = []
    for path in dict.fromkeys((*wanted, *actual)):
        a, b = wanted.get(path), actual.get(path)
        if a is None or b is None:  # a map that adds nothing may be left out
            error = float(any(bool(own.any()) for own in (a, b) if own is not None))
        elif a.shape != b.shape:
            error = 1.0
        else:
            error = float((b - a).norm() / a.norm().clamp_min(1e-300)) if bool(a.any()) else float(b.norm())
        maps.append(ConvertedSite(None, path, None, None, error, error))
    wrong = sorted((m for m in maps if not m.error <= allowed), key=lambda m: -m.error)
    if wrong:
        message = f"the written adapter's update differs at {len(wrong)} of {len(maps)} maps: {wrong[0].site}"
        hint = "the source may have a layout other than the assumed one: name it with --from"
        raise GraftError("GC067", message, hint=hint, details=tuple(f"{m.site}: {m.error:.1e}" for m in wrong))
    return tuple(maps)


def _level(own: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return one side's responses, with parts joined where the other side has them fused into one map."""
    result = dict(own)
    for path in other:
        module, _, last = path.rpartition(".")
        fusion = next((f for f in FUSED.values() if f.fused == last), None)
        if fusion is None or path in own:
            continue
        parts = [result.pop(f"{module}.{part}", None) for part in fusion.parts]
        missing = sum(part is None for part in parts)
        known = sum(part.shape[0] for part in parts if part is not None)
        if missing == len(parts):
            continue
        rest = (other[path].shape[0] - known) // max(missing, 1)
        zeros = torch.zeros(rest, other[path].shape[1], dtype=torch.float64)
        result[path] = torch.cat([zeros if part is None else part for part in parts])
    return result


def _tensors(folder: Path) -> dict[str, Tensor]:
    return dict(adapter_tensors(folder / WEIGHTS))


def _config(folder: Path) -> dict[str, Any]:
    raw = config_bytes(folder / CONFIG)
    read_config(raw, str(folder / CONFIG))  # raises if it is not a config
    return dict(read_json(raw, MOST))


def _require_different(folders: Sequence[Path]) -> None:
    seen: dict[str, Path] = {}
    for folder in folders:
        first = seen.setdefault(os.path.realpath(folder), folder)
        if first is not folder:
            message = f"{folder} is named twice" if first == folder else f"{folder} and {first} are one folder"
            raise GraftError("GC073", message, hint="its update would be added twice: name each adapter once")


def _require_readable(folders: Sequence[Path]) -> None:
    for folder in folders:
        if not is_adapter_folder(folder):
            lacking = some([name for name in (CONFIG, WEIGHTS) if not (folder / name).is_file()])
            hint = None if (folder / CONFIG).is_file() else reader_of(folder)
            raise GraftError("GC110", f"{folder} {missing(folder, lacking)}", place=Place(str(folder)), hint=hint)


def _require_one_base(folders: Sequence[Path], configs: Sequence[Mapping[str, Any]]) -> None:
    """Raise if the adapters' configs name different bases.

    Raises:
        GraftError: GC069.
    """
    named = {
        str(config["base_model_name_or_path"]): path
        for config, path in zip(configs, folders, strict=True)
        if config.get("base_model_name_or_path")
    }
    if len(named) > 1:
        (first, _), (second, path), *_ = named.items()
        message = f"the adapters name different bases: {first} and, in {path}, {second}"
        raise GraftError("GC069", message, hint="if both are the same model, name it: --model MODEL")


def _base(config: Mapping[str, Any], model: Path | None) -> Path | None:
    """Return the base's folder, or a folder with only its config; None if it is not on this machine."""
    if model is not None:
        if not (model / "config.json").is_file():
            raise GraftError("GC069", f"{model} has no config.json", place=Place(str(model)))
        return model
    named = config.get("base_model_name_or_path")
    return local_config(named) if isinstance(named, str) and named else None


def _heads(base: Path, *, required: bool) -> AttentionSizes | None:
    file = base / "config.json"
    try:
        return AttentionSizes.of(json.loads(read_regular(file)), str(file))
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise GraftError("GC069", f"the base's config cannot be read: {error}", place=Place(str(file))) from None
    except GraftError:
        if required:
            raise
        return None
