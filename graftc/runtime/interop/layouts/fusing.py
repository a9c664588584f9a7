"""Join and split maps that one program stores separately and another fuses: q, k and v, or gate and up projections.

Joining is exact: if the parts share ``A``, it is stored once; otherwise ``B`` becomes block-diagonal, and ranks add up.
Splitting keeps only the ranks that each part's rows use, so that splitting a joined map restores its parts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import torch

from graftc.runtime.interop.layouts.plain import AttentionSizes, PlainAdapter, Update
from graftc.specs.errors.diagnostics import GraftError


@dataclass(frozen=True)
class Fusion:
    """Maps of one module that another model stores as a single map, with their rows in this order."""

    fused: str
    parts: tuple[str, ...]


FUSED: Mapping[str, Fusion] = MappingProxyType(
    {
        "qkv": Fusion("qkv_proj", ("q_proj", "k_proj", "v_proj")),
        "gate_up": Fusion("gate_up_proj", ("gate_proj", "up_proj")),
    }
)
"""The possible fusions, by their names on the command line."""


def together(parts: Sequence[Update | None], rows: Sequence[int]) -> Update:
    """Return one update for the map that consists of the parts' rows, in order.

    Args:
        parts: the parts' updates; None for a part without one.
        rows: number of rows of each part.

    Raises:
        RuntimeError: if the parts read inputs of different sizes.
    """
    first = next(part for part in parts if part is not None)
    scaled = [None if part is None else part.scaled(first.scale) for part in parts]
    present = [part for part in scaled if part is not None]
    shared = all(p.down.shape == first.down.shape and torch.equal(p.down, first.down) for p in present)
    width = first.rank if shared else sum(p.rank for p in present)
    up = torch.zeros(*first.up.shape[:-2], sum(rows), width, dtype=first.up.dtype)
    row = column = 0
    for part, count in zip(scaled, rows, strict=True):
        if part is not None:
            up[..., row : row + count, column : column + part.rank] = part.up
            column += 0 if shared else part.rank
        row += count
    down = first.down if shared else torch.cat([p.down for p in present], -2)
    return Update(down, up, first.scale)


def apart(update: Update, rows: Sequence[int]) -> list[Update]:
    """Split an update by rows, into one update for each part."""
    return [replace(update, up=block).trimmed() for block in torch.split(update.up, list(rows), -2)]


def joined(adapter: PlainAdapter, what: str, heads: AttentionSizes | None = None) -> PlainAdapter:
    """Return the adapter with the parts joined into their fused maps.

    Args:
        adapter: the adapter with separate parts.
        what: a key of `FUSED`.
        heads: the base's attention sizes, needed if an adapter has only some of q, k and v.

    Raises:
        GraftError: GC069 if the rows of a missing part are unknown, if the parts read inputs of different sizes, or if
            there is nothing to join.
    """
    fusion = FUSED[what]
    updates: dict[str, Update] = {}
    groups: dict[str, dict[str, Update]] = {}
    for path, update in adapter.updates.items():
        module, _, last = path.rpartition(".")
        if last in fusion.parts and update.experts is None:
            groups.setdefault(module, {})[last] = update
            updates.setdefault(f"{module}.{fusion.fused}", update)  # keeps the position of the first part
        else:
            updates[path] = update
    if not groups:
        raise GraftError("GC069", f"the adapter has none of {', '.join(fusion.parts)} to join")
    for module, parts in groups.items():
        rows = _rows(fusion, parts, heads, module)
        try:
            updates[f"{module}.{fusion.fused}"] = together([parts.get(part) for part in fusion.parts], rows)
        except (ValueError, RuntimeError) as error:
            raise GraftError("GC069", f"the maps of {module} read inputs of different sizes") from error
    return replace(adapter, updates=updates)


def split(adapter: PlainAdapter, what: str, heads: AttentionSizes | None = None) -> PlainAdapter:
    """Return the adapter with fused maps split into their parts.

    Raises:
        GraftError: GC069 if the rows of the parts are unknown or do not add up, or if there is nothing to split.
    """
    fusion = FUSED[what]
    updates: dict[str, Update] = {}
    hits = 0
    for path, update in adapter.updates.items():
        module, _, last = path.rpartition(".")
        if last != fusion.fused or update.experts is not None:
            updates[path] = update
            continue
        hits += 1
        rows = _sizes(fusion, update.rows, heads)
        if sum(rows) != update.rows:
            message = f"{path} has {update.rows} rows, but its parts have {' + '.join(map(str, rows))}"
            raise GraftError("GC069", message, hint="name the base that the adapter is for: --model MODEL")
        for part, piece in zip(fusion.parts, apart(update, rows), strict=True):
            if bool(piece.up.any()):
                updates[f"{module}.{part}"] = piece
    if not hits:
        raise GraftError("GC069", f"the adapter has no {fusion.fused} to split")
    return replace(adapter, updates=updates)


def _sizes(fusion: Fusion, total: int, heads: AttentionSizes | None) -> list[int]:
    if len(fusion.parts) == 2:
        return [total // 2, total // 2]
    if heads is None:
        hint = "name the base that the adapter is for: --model MODEL"
        raise GraftError("GC069", f"the rows of {', '.join(fusion.parts)} are not known", hint=hint)
    return [heads.queries * heads.size, heads.keys * heads.size, heads.keys * heads.size]


def _rows(fusion: Fusion, updates: Mapping[str, Update], heads: AttentionSizes | None, module: str) -> list[int]:
    """Return the number of rows of every part, including missing ones."""
    if len(fusion.parts) == 2:
        size = next(iter(updates.values())).rows
        return [size, size]
    if len(updates) == len(fusion.parts):
        return [updates[part].rows for part in fusion.parts]
    queries, keys = updates.get("q_proj"), updates.get("k_proj", updates.get("v_proj"))
    if heads is None and queries is not None and keys is not None:
        return [queries.rows, keys.rows, keys.rows]
    return _sizes(fusion, 0, heads)
