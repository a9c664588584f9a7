"""Read LoRA adapters as pairs of factors by site, and fit them into the slots of a bank.

They come from folders that peft wrote, from artifacts, or as tensors. Everything is checked before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from graftc.compiler.capture.identity.fingerprint import Identity
from graftc.compiler.compilation import Compilation
from graftc.compiler.resolve.slots import unslotted
from graftc.passes.core.weights.names import parsed
from graftc.records.site_key import SiteKey
from graftc.runtime.artifact.places import is_peft
from graftc.runtime.artifact.read import open_artifact
from graftc.runtime.interop.peft.base import shapes_of
from graftc.runtime.interop.peft.folder import finite, read_peft
from graftc.runtime.interop.peft.importing import check_model
from graftc.specs.compose import Bank
from graftc.specs.errors.arguments import as_mapping, as_path
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import quoted
from graftc.specs.methods.lora import LoRA

Source = str | Path | Mapping[str, Tensor]
"""An adapter: a folder that peft wrote, an artifact with one LoRA, or tensors by the names in a compiled model."""


class FactorPair(NamedTuple):
    """The update ``scale * b @ a`` of one site: ``a: [..., rank, in]``, ``b: [..., out, rank]``."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True)
class AdapterFactors:
    """A LoRA adapter, apart from any compiled model.

    Attributes:
        where: where it comes from, for messages.
        pairs: its factors, by site; a scale of 0 stands for that of the bank.
    """

    where: str
    pairs: Mapping[SiteKey, FactorPair]

    @property
    def rank(self) -> int:
        """The largest rank of its sites."""
        return max(pair.a.shape[-2] for pair in self.pairs.values())


def read_factors(source: Source, model: nn.Module, identity: Callable[[bool], Identity]) -> AdapterFactors:
    """Read an adapter.

    Args:
        source: the adapter. Tensors are named as in `adapter_state_dict` of a model with one LoRA.
        model: the base.
        identity: a function that returns the identity of the base, with or without every value.

    Raises:
        GraftError: GC191 for an adapter that is not a plain LoRA; GC053 for tensors that are not pairs of factors;
            GC080 to GC085 and GC087 for an artifact, GC110 to GC114 for a folder of peft's, that cannot be read or has
            another base.
    """
    if isinstance(source, Mapping):
        return _from_tensors(source)
    path = as_path(source)
    factors = _from_peft(path, model) if is_peft(path) else _from_artifact(path, identity)
    if not factors.pairs:
        raise GraftError("GC191", f"{factors.where} adapts nothing")
    return factors


def _from_tensors(tensors: Mapping[str, Tensor]) -> AdapterFactors:
    as_mapping(tensors, "an adapter's tensors", Tensor)
    where = "the mapping of tensors"
    parts: dict[SiteKey, dict[str, Tensor]] = {}
    owners: set[str] = set()
    for fqn, tensor in tensors.items():
        name = parsed(fqn)
        if name is None or name.part.rpartition(".")[2] not in ("A", "B"):
            message = f"{quoted(fqn)} is not a tensor of a LoRA"
            raise GraftError("GC053", message, hint="names have the form <module>.graftc.<adaptation>.A or .B")
        *inside, part = name.part.split(".")
        parts.setdefault(SiteKey(name.module, "weight", ".".join(inside)), {})[part] = tensor.detach()
        owners.add(name.adaptation)
    if len(owners) != 1:
        raise GraftError("GC053", f"{where} has {len(owners)} adaptations, not one")
    return AdapterFactors(where, _paired(where, parts, dict.fromkeys(parts, 0.0)))


def _paired(
    where: str, parts: Mapping[SiteKey, Mapping[str, Tensor]], scales: Mapping[SiteKey, float]
) -> dict[SiteKey, FactorPair]:
    pairs = {}
    for key, own in parts.items():
        paired = own.keys() == {"A", "B"} and min(tensor.dim() for tensor in own.values()) >= 2
        if not paired or own["A"].shape[-2] != own["B"].shape[-1]:
            shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in own.items())
            raise GraftError("GC053", f"{where}: not a pair of factors at {key}: {shapes}")
        pairs[key] = FactorPair(own["A"], own["B"], scales[key])
    return pairs


def _from_peft(path: Path, model: nn.Module) -> AdapterFactors:
    adapter = read_peft(path, shapes=shapes_of(model))
    if adapter.config.format[0] is not LoRA:
        message = f"{path} is {adapter.config.format[0].tag()}, but slots contain lora"
        raise GraftError("GC191", message, place=adapter.in_config("peft_type"))
    check_model(adapter, model)
    if adapter.trained:
        message = f"{path} also trains {next(iter(adapter.trained))}, which all adapters of the bank would share"
        raise GraftError("GC191", message, place=adapter.in_config("modules_to_save"))
    parts, scales = {}, {}
    for module in adapter.modules:
        reason = unslotted(module.spec) or ("it is at a module with several adapters" if module.depth else None)
        if not isinstance(module.spec, LoRA) or reason is not None:
            raise GraftError("GC191", f"{path} does not fit at {module.path}: {reason}", place=adapter.place)
        key = SiteKey(module.path, module.parameter)
        parts[key], scales[key] = adapter.tensors(module), module.spec.scaling
    return AdapterFactors(str(path), _paired(str(path), parts, scales))


def _from_artifact(path: Path, identity: Callable[[bool], Identity]) -> AdapterFactors:
    artifact = open_artifact(path)
    spec, lora = artifact.spec, artifact.spec.adapt[0] if len(artifact.spec.adapt) == 1 else None
    more = [field for field in ("compose", "train", "tokens", "untie") if getattr(spec, field)]
    reason = (
        f"its spec has {more[0]}" if more else unslotted(lora) if lora is not None else "it has several adaptations"
    )
    if reason is not None or not isinstance(lora, LoRA):
        raise GraftError("GC191", f"{path} is not a single LoRA: {reason}")
    if differences := artifact.identity.differences(identity(artifact.manifest.base.full)):
        message = f"{path} adapts another base: {differences[0]}"
        raise GraftError("GC087", message, details=differences[1:5])
    tensors, parts, scales = artifact.tensors(), {}, {}
    for place in artifact.manifest.sites:
        own = lora.for_site(place.module, place.roles, place.layer, depth=artifact.depths.get(place.stack))
        key = place.key.place
        parts[key] = {part: tensors[name] for part, name in place.tensors.items()}
        scales[key] = own.scaling
    return AdapterFactors(str(path), _paired(str(path), parts, scales))


def slot_values(
    compilation: Compilation, bank: Bank, factors: AdapterFactors, scale: float | None = None
) -> dict[str, Tensor]:
    """Return an adapter as a slot of a bank stores it: padded to the slot's rank, with its scale folded into B.

    Args:
        compilation: the compilation that has the bank.
        bank: the bank.
        factors: the adapter.
        scale: the factor of its products, if it does not state one; by default the bank's.

    Returns:
        Its tensors, by the names of the bank's tensors.

    Raises:
        GraftError: GC191, which lists every site that does not fit; GC053 if values are not finite; GC073 for a scale
            that is not a finite number.
    """
    numeric = isinstance(scale, int | float) and not isinstance(scale, bool) and math.isfinite(scale)
    if scale is not None and not numeric:
        raise GraftError("GC073", f"scale is {scale!r}", hint="pass a finite number")
    unit = compilation.unit_of[str(bank.name)]
    specs = {site.key.place: own for site, own in unit.members[0].sites}
    parts = {key.place: names for key, names in compilation.parts[unit.name].items() if key is not None}
    problems: list[str] = []
    values: dict[str, Tensor] = {}
    for key, pair in factors.pairs.items():
        own = specs.get(key)
        if own is None or key not in parts:
            problems.append(f"{key}: the bank does not adapt it")
            continue
        assert isinstance(own, LoRA)
        names = parts[key]
        like = {part: compilation.store.get(names[part])[0] for part in ("A", "B")}
        missing = own.rank - pair.a.shape[-2]
        if any(not t.is_floating_point() or t.layout != torch.strided or t.is_meta for t in (pair.a, pair.b)):
            problems.append(f"{key}: its factors are not dense floating-point tensors with values")
            continue
        if missing < 0:
            problems.append(f"{key}: rank {pair.a.shape[-2]}, but slots have {own.rank}")
            continue
        stated = pair.scale or (own.scaling if scale is None else scale)
        b = pair.b.to(torch.promote_types(pair.b.dtype, torch.float32)) * (stated / own.scaling)
        padded = {"A": nn.functional.pad(pair.a, (0, 0, 0, missing)), "B": nn.functional.pad(b, (0, missing))}
        for part, value in padded.items():
            if value.shape != like[part].shape:
                problems.append(f"{key}: {part} is {list(value.shape)}, but slots have {list(like[part].shape)}")
            values[names[part]] = value.to(like[part].dtype)
    if problems:
        message = f"{factors.where} does not fit {bank.name!r}: {problems[0]}"
        raise GraftError("GC191", message, details=problems[1:50])
    if odd := [name for name, value in values.items() if not finite(value)]:
        raise GraftError("GC053", f"{factors.where} has values that are not finite: {odd[0]}", details=odd[1:50])
    return values
