"""The identity of a base: its config, and the names, types and values (all or a sample) of its tensors."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from graftc.passes.core.ir.shapes import DTYPE_NAMES, raw_bytes
from graftc.passes.core.packing.packing import PackedType, weight_name
from graftc.passes.core.weights.store import Store

SAMPLES = 64

Setting: TypeAlias = bool | int | float | str
_PASSING = frozenset(
    {
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "problem_type",
        "use_cache",
        "quantization_config",
    }
)
"""Incidental settings, which depend on how the model was created or what was run; dtypes and packings are read from the
tensors."""


@dataclass(frozen=True)
class TensorIdentity:
    """The identity of one base tensor.

    Attributes:
        dtype: its dtype, such as ``"f32"``; for the codes of a packed weight, the packing and the weight's dtype, such
            as ``"nf4 group=64; f32"``.
        shape: its sizes.
        digest: the SHA-256 of its values, or of a sample; empty on the meta device.
        parameter: whether it is a parameter; otherwise it is a buffer.
    """

    dtype: str
    shape: tuple[int, ...]
    digest: str
    parameter: bool = True


@dataclass(frozen=True)
class Identity:
    """The identity of a base.

    Attributes:
        config: the SHA-256 of the model's config without incidental settings; empty if there is none.
        tensors: the identity of each tensor, by the name that owns it.
        full: whether digests cover every value instead of `SAMPLES` evenly spaced ones.
        settings: the plain values of its config by name, used to describe how two configs differ.
    """

    config: str
    tensors: Mapping[str, TensorIdentity]
    full: bool = False
    settings: Mapping[str, Setting] = field(default_factory=dict, compare=False)

    @property
    def fingerprint(self) -> str:
        """A single digest of the config and all tensors."""
        digest = hashlib.sha256(self.config.encode())
        for name, tensor in sorted(self.tensors.items()):
            digest.update(f"|{name}|{tensor.dtype}|{tensor.shape}|{tensor.digest}".encode())
        return digest.hexdigest()

    @property
    def packings(self) -> dict[str, str]:
        """The packings and dtypes of packed weights by name, in the format of `described`."""
        return {
            weight_name(name): tensor.dtype
            for name, tensor in self.tensors.items()
            if weight_name(name) != name and "; " in tensor.dtype
        }

    def differences(self, other: Identity) -> list[str]:
        """Return descriptions of how ``other`` differs from this base; empty if it is the same."""
        differences = [] if self.config == other.config else [self.other_config(other)]
        differences += [f"it has no {name}" for name in self.tensors if name not in other.tensors]
        differences += [f"it also has a {name}" for name in other.tensors if name not in self.tensors]
        for name, mine in self.tensors.items():
            theirs = other.tensors.get(name)
            if theirs is None or theirs == mine:
                continue
            if (mine.dtype, mine.shape) != (theirs.dtype, theirs.shape):
                differences.append(f"{name} is {_type(theirs)}, not {_type(mine)}")
            else:
                differences.append(f"{name} has different values")
        return differences

    def other_config(self, other: Identity) -> str:
        """Return a description of how another base's config differs."""
        names = [*self.settings, *(name for name in other.settings if name not in self.settings)]
        pairs = [(name, self.settings.get(name), other.settings.get(name)) for name in names]
        shown = [f"{name} {theirs!r}, not {mine!r}" for name, mine, theirs in pairs if mine != theirs]
        more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
        return f"its config has {', '.join(shown[:3])}{more}" if shown else "its config differs"


def _type(tensor: TensorIdentity) -> str:
    return f"{tensor.dtype}[{', '.join(map(str, tensor.shape))}]"


def identify(model: nn.Module, *, full: bool = False, replaced: Collection[str] = ()) -> Identity:
    """Return the identity of a base.

    Args:
        model: the source model.
        full: whether to digest every value instead of `SAMPLES` values of each tensor. Scales and zero points of packed
            weights are always digested in full: the codes of two quantisers may be nearly equal, so that a sample would
            miss the difference.
        replaced: names of tensors whose values do not identify the base; see `replaced_tensors`.
    """
    store = Store.mirror(model)
    packed = {own.names(name)[0]: described(own) for name, own in store.packed.items()}
    in_full = {part for name, own in store.packed.items() for part in own.names(name)[1:]}
    tensors = {
        name: TensorIdentity(
            packed.get(name) or _short(tensor.dtype),
            tuple(tensor.shape),
            tensor_digest(tensor[:0] if tensor.dim() else tensor.new_empty(0), full=full)
            if name in replaced
            else tensor_digest(tensor, full=full or name in in_full),
            isinstance(tensor, nn.Parameter),
        )
        for name, tensor in store.base()
    }
    config = getattr(model, "config", None)
    return Identity(config_digest(config), tensors, full, settings_of(config))


def described(own: PackedType) -> str:
    """Return a weight's packing and dtype as text, such as ``"nf4 group=64; f32"``."""
    return f"{own.packing.text}; {_short(own.dtype)}"


def _short(dtype: torch.dtype) -> str:
    return DTYPE_NAMES.get(dtype, str(dtype))


def replaced_tensors(updated: Iterable[str], trained: Iterable[str], aliases: Mapping[str, str]) -> frozenset[str]:
    """Return the names of the base tensors that a compiled model replaces, so that their values do not matter.

    Args:
        updated: names of the tensors that graphs write to.
        trained: names of the tensors that are trained in full, such as a head that is random in every base.
        aliases: tied names, each with the name that owns the tensor. The values of a trained tensor do matter if it is
            tied: a spec may untie it and train only one of the two.
    """
    tied = {*aliases, *aliases.values()}
    return frozenset({*updated, *(name for name in trained if name not in tied)})


def tensor_digest(tensor: Tensor, *, full: bool = True) -> str:
    """Return the SHA-256 of a tensor's bytes in row-major order, or of `SAMPLES` evenly spaced elements.

    The digest is empty for a tensor on the meta device.
    """
    if tensor.device.type == "meta":
        return ""
    flat = tensor.detach().reshape(-1)
    if not full:
        flat = flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES]
    return hashlib.sha256(raw_bytes(flat)).hexdigest()


def config_digest(config: Any) -> str:
    """Return the SHA-256 of a config without incidental settings; empty if there is none."""
    settings = _all_settings(config)
    return "" if settings is None else hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()


def settings_of(config: Any) -> dict[str, Setting]:
    """Return the plain values of a config by name: numbers, strings and booleans, except incidental settings."""
    settings = (_all_settings(config) or {}).items()
    return {k: v for k, v in settings if isinstance(v, bool | int | float | str) and _is_short(v)}


def _is_short(value: Setting) -> bool:
    return len(value) <= 256 if isinstance(value, str) else math.isfinite(value) and abs(value) < 2**63


def _all_settings(config: Any) -> dict[str, Any] | None:
    to_dict = getattr(config, "to_dict", None)
    if to_dict is None:
        return None
    # Convert through JSON first: a config read from a file has strings where one created in Python may have numbers.
    settings: dict[str, Any] = _without_passing(json.loads(json.dumps(to_dict(), default=str)))
    return settings


def _without_passing(value: Any) -> Any:
    if isinstance(value, list):
        return [_without_passing(item) for item in value]
    if not isinstance(value, dict):
        return value
    return {k: _without_passing(v) for k, v in value.items() if not k.startswith("_") and k not in _PASSING}
