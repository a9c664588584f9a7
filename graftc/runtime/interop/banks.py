"""Make a bank of adapters that peft or graftc wrote."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from graftc.compiler.capture.identity.fingerprint import identify
from graftc.compiler.capture.interface import Flags
from graftc.compiler.capture.signature import Axis
from graftc.compiler.compilation import Compilation
from graftc.compiler.missing_weights import check_fresh
from graftc.compiler.pipeline import StartingPoint, compile_model
from graftc.runtime.interop.factors import read_factors, slot_values
from graftc.runtime.interop.peft.base import paths_of, shapes_of
from graftc.runtime.interop.peft.targets import globs
from graftc.runtime.slots import Slots
from graftc.specs.compose import Bank
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError


def imported_bank(
    folders: Mapping[str, Path],
    model: nn.Module,
    axes: Sequence[Axis] | None,
    flags: Flags,
    *,
    slots: int,
    rank: int | None,
    cache: bool,
) -> Compilation:
    """Compile a model with a bank of LoRA adapters, for `graftc.import_peft`.

    The bank adapts every module that any of them adapts, at the highest rank; its scale is 1.

    Args:
        folders: PEFT folders or artifacts, by the names of their slots.
        model: the base.
        axes, flags: the axes and flags to capture the model with.
        slots: the number of empty slots.
        rank: the rank of all slots; by default the highest of the adapters.
        cache: whether to cache captured graphs in the user's cache folder.

    Raises:
        GraftError: GC191 for an adapter that is not a plain LoRA of whole weights; others as `read_factors`.
    """
    identity = functools.cache(lambda full: identify(model, full=full))
    adapters = {name: read_factors(folder, model, identity) for name, folder in folders.items()}
    pairs = {key: pair for own in adapters.values() for key, pair in own.pairs.items()}
    if odd := [key for key in pairs if key.part or key.name != "weight"]:
        message = f"{odd[0]} is not a whole weight of a module"
        raise GraftError("GC191", message, hint="compile a bank with the spec of the adapters, and add them")
    highest = rank or max(own.rank for own in adapters.values())
    entry = {
        "method": "lora",
        "rank": highest,
        "alpha": highest,
        "excess_rank": any(highest > min(pair.a.shape[-1], pair.b.shape[-2]) for pair in pairs.values()),
        "target": {"modules": globs([key.module for key in pairs], [*paths_of(model), *shapes_of(model)])},
    }
    adapt = [{**entry, "name": name} for name in adapters]
    spec = Spec.model_validate({"version": 1, "adapt": adapt, "compose": {"bank": list(adapters), "slots": slots}})
    compilation = compile_model(spec, model, axes, flags=flags, start=StartingPoint(use_cache=cache))
    check_fresh(compilation)
    (bank,) = compilation.spec.compose
    own_slots = Slots.of(bank, compilation.store)
    assert isinstance(bank, Bank) and own_slots is not None
    values = [slot_values(compilation, bank, own) for own in adapters.values()]
    for slot, own in enumerate(values):
        own_slots.write(slot, own)
    return compilation
