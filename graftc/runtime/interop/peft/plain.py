"""Convert a PEFT folder to plain LoRA, which every engine reads correctly.

The update is scaled by ``alpha / rank``, and the base stays unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.runtime.interop.peft.exporting import PeftExport
from graftc.runtime.interop.peft.pairs import split, table_of


def plain(export: PeftExport, compilation: Compilation) -> PeftExport:
    """Return the same update as plain LoRA: without ``use_rslora``, which some engines ignore.

    Factors initialised from the weight are joined with their initial values, which doubles the rank, because engines
    add the update to the unmodified base.

    Args:
        export: a folder's contents, which are not changed.
        compilation: the compiled model that they were created from.
    """
    config, tensors = dict(export.config), dict(export.tensors)
    if config.get("peft_type") != "LORA" or config.get("use_dora"):
        return export
    if config.get("use_rslora"):
        config |= {**_scaled(config), "use_rslora": False}
    starts = _starts(export, compilation)
    if starts:
        tensors |= starts
        config |= {**_doubled(config), "init_lora_weights": True}
    return replace(export, config=config, tensors=tensors)


def subtracts_unknown_start(export: PeftExport, compilation: Compilation) -> bool:
    """Return whether an initial product is subtracted that PEFT cannot compute from the base again."""
    if not _starts(export, compilation):
        return False
    main, _ = split(compilation)
    table = table_of(main.spec)
    assert table is not None
    return any(
        meanings.get(export.config.get(theirs)) != getattr(main.spec, table.fields[theirs])
        for theirs, meanings in table.values.items()
    )


def _scaled(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return alphas such that ``alpha / rank`` equals the original ``alpha / sqrt(rank)``."""
    rank, alpha = int(config["r"]), float(config["lora_alpha"])
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    usual = alpha * rank**0.5
    own = {name: float(alphas.get(name, alpha)) * int(ranks.get(name, rank)) ** 0.5 for name in {**ranks, **alphas}}
    return {
        "lora_alpha": _whole(usual),
        "alpha_pattern": {name: _whole(value) for name, value in own.items() if value != usual},
    }


def _doubled(config: Mapping[str, Any]) -> dict[str, Any]:
    doubled: dict[str, Any] = {field: config[field] * 2 for field in ("r", "lora_alpha")}
    for field in ("rank_pattern", "alpha_pattern"):
        doubled[field] = {name: value * 2 for name, value in (config.get(field) or {}).items()}
    return doubled


def _starts(export: PeftExport, compilation: Compilation) -> dict[str, Tensor]:
    """Return the factors with their initial values appended (negated for ``B``), by the factors' keys."""
    starts = {
        names[part]: names[f"{part}0"]
        for sites in compilation.parts.values()
        for names in sites.values()
        for part in ("A", "B")
        if f"{part}0" in names
    }
    tensors = {}
    for pair in export.pairs:
        if pair.tensor not in starts:
            continue
        own, start = (compilation.store.full(name).detach() for name in (pair.tensor, starts[pair.tensor]))
        both = [own, start.to(own.dtype)] if pair.part == "A" else [own, -start.to(own.dtype)]
        tensors[pair.key] = pair.write(torch.cat(both, -2 if pair.part == "A" else -1)).contiguous()
    return tensors


def _whole(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
