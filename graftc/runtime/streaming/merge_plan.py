"""Plan a merge, and check the plan as a whole before anything is written."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.one_map import OneMap
from graftc.files.tensors.folder import TensorFolder
from graftc.files.tensors.headers import StoredTensor
from graftc.files.tensors.writing import FLOATING
from graftc.runtime.streaming.sites import FileSite, sites_of
from graftc.runtime.streaming.update import AdapterUpdates, Replacement, SiteUpdate
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.regular_files import read_regular

_SHOWN = 30
"""Maximum number of wrong tensors that an error lists."""


@dataclass(frozen=True)
class MergePlan:
    """A merge to perform.

    Attributes:
        checkpoint: the base.
        updates: the adapter.
        sites: the sites to fold.
        dtype: the dtype in which 16-bit tensors are written; None to keep their own.
    """

    checkpoint: TensorFolder
    updates: AdapterUpdates
    sites: tuple[FileSite, ...]
    dtype: str | None
    _blocks: dict[tuple[str, int], OneMap] = field(default_factory=dict, repr=False)
    _building: Lock = field(default_factory=Lock, repr=False, compare=False)

    @cached_property
    def replacements(self) -> dict[str, Replacement]:
        """The trained copies, by the names of the tensors that they replace."""
        return {item.tensor: item for item in self.updates.replacements}

    def block(self, site: FileSite, rows: int) -> OneMap:
        """Return the map for a given number of a site's rows, without values; all sites of the same kind share it.

        Raises:
            GraftError: as in `FileSite.block`.
        """
        key = site.kind, rows
        with self._building:
            if key not in self._blocks:
                self._blocks[key] = site.block(rows)
            return self._blocks[key]

    def current(self, name: str) -> Tensor:
        """Return the trained copy that replaces a tensor of the base, or otherwise the tensor itself."""
        replacement = self.replacements.get(name)
        return self.checkpoint[name] if replacement is None else replacement.value

    def written(self, stored: StoredTensor) -> str:
        """Return the dtype in which a tensor is written."""
        widened = self.dtype is not None and stored.dtype in ("F16", "BF16")
        return self.dtype if widened and self.dtype is not None else stored.dtype


def make_plan(checkpoint: TensorFolder, updates: AdapterUpdates, dtype: str | None = None) -> MergePlan:
    """Return the plan of a merge, after checking that the adapter fits the checkpoint.

    Args:
        checkpoint: the base.
        updates: the adapter.
        dtype: ``"F32"``, or None for the base's own dtypes.

    Raises:
        GraftError: GC102, which lists every mismatch, GC103 if the base is quantised, GC104 if the adapter changes no
            stored tensor.
    """
    _check_floating(checkpoint, updates)
    tensors = checkpoint.entries
    wrong = [problem for update in updates.updates for problem in _wrong_slices(update, tensors)]
    wrong += [problem for item in updates.replacements for problem in _wrong_copy(item, tensors)]
    if not updates.updates and not updates.replacements:
        raise GraftError("GC104", "the adapter changes no stored tensor")
    _raise(checkpoint, wrong)
    plan = MergePlan(checkpoint, updates, tuple(sites_of(updates.updates)), dtype)
    _raise(checkpoint, [problem for site in plan.sites for problem in _wrong_parts(plan, site)])
    return plan


def _raise(checkpoint: TensorFolder, wrong: list[str]) -> None:
    if not wrong:
        return
    more = [f"... and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else []
    raise GraftError(
        "GC102",
        f"the adapter does not fit {checkpoint.path}: {wrong[0]}",
        hint="use the base that the adapter was trained on",
        details=[*wrong[1:_SHOWN], *more],
    )


def stored_config(folder: Path) -> dict[str, Any]:
    """Return the config in a model's folder; empty if there is none.

    Raises:
        GraftError: GC100 if it cannot be read or is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        return {}
    try:
        data = json.loads(read_regular(path))
    except (OSError, ValueError, RecursionError) as error:
        raise GraftError("GC100", f"{path} cannot be read: {error}") from error
    if not isinstance(data, dict):
        raise GraftError("GC100", f"{path} is not a JSON object")
    return data


def _check_floating(checkpoint: TensorFolder, updates: AdapterUpdates) -> None:
    config = stored_config(checkpoint.path)
    hint = "merge in memory (--base full), without --stream; or name the model it was quantised from: --model FOLDER"
    if config.get("quantization_config"):
        raise GraftError(
            "GC103", f"{checkpoint.path} is quantised, and folded rows cannot be quantised here", hint=hint
        )
    tensors = checkpoint.entries
    changed = [own.tensor for u in updates.updates for own in (u.weight, u.bias) if own is not None]
    changed += [item.tensor for item in updates.replacements]
    for name in changed:
        stored = tensors.get(name)
        if stored is not None and stored.dtype not in FLOATING:
            raise GraftError("GC103", f"{name} of {checkpoint.path} is stored as {stored.dtype}", hint=hint)


def _wrong_slices(update: SiteUpdate, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    for own in (update.weight, update.bias):
        if own is None:
            continue
        stored = tensors.get(own.tensor)
        if stored is None:
            yield f"there is no {own.tensor}, which {update.adaptation!r} changes"
        elif stored.shape != own.shape:
            yield f"{own.tensor} is {list(stored.shape)}, but {update.adaptation!r} is for {list(own.shape)}"


def _wrong_copy(item: Replacement, tensors: Mapping[str, StoredTensor]) -> Iterator[str]:
    stored = tensors.get(item.tensor)
    if stored is None:
        yield f"there is no {item.tensor}, which {item.adaptation!r} replaces"
    elif stored.shape != tuple(item.value.shape):
        yield f"{item.tensor} is {list(stored.shape)}, but {item.adaptation!r} is for {list(item.value.shape)}"
    elif not bool(torch.isfinite(item.value).all()):
        yield f"{item.adaptation!r} replaces {item.tensor} with values that are not finite"


def _wrong_parts(plan: MergePlan, site: FileSite) -> Iterator[str]:
    """Yield the problems with the adapter's tensors at a site: shapes that do not fit, or values that are not finite.

    Raises:
        GraftError: GC113 for a tensor that PEFT's file should contain; GC103 for one that depends on the model.
    """
    full = plan.block(site, site.weight.count)
    for update in site.updates:
        where, parts = f"{update.adaptation!r} at {update.site}", update.read()
        for own, shape in full.shapes.items():
            if own.adaptation != update.adaptation:
                continue
            tensor = parts.get(own.part)
            if tensor is None:
                table = update.spec.peft if plan.updates.kind == "peft" else None
                if table is not None and own.part in table.parts.keys() - table.derived:
                    raise GraftError("GC113", f"the file has no {own.part} of {where}")
                message = f"the file of {where} has no {own.part}, which depends on the model"
                hint = "import it with graftc import-peft, then merge the artifact"
                raise GraftError("GC103", message, hint=hint)
            actual = tuple(tensor.shape)
            least = len(actual) == len(shape) and all(a >= b for a, b in zip(actual, shape, strict=True))
            if not (actual == shape or (least and not own.module)):
                yield f"{own.part} of {where} is {list(actual)}, not {list(shape)}"
            elif tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                yield f"{own.part} of {where} is not finite"
