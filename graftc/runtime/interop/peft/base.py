"""Helpers for comparing adapters with a base: its modules' paths and shapes, and the spec that adapts it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from torch import nn

from graftc.compiler.compilation import Compilation
from graftc.compiler.roles.structure import Structure
from graftc.runtime.interop.peft.targets import globs
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.document import Spec
from graftc.specs.foreign.config import AdapterConfig
from graftc.specs.peft import PeftFormat


def paths_of(model: nn.Module) -> list[str]:
    """Return the paths of all modules except the model itself."""
    return [path for path, _ in model.named_modules(remove_duplicate=False) if path]


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shapes of all parameters, by name."""
    return {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}


def outermost(paths: Collection[str]) -> list[str]:
    """Return the paths that are not nested below any other of the given paths."""
    return [path for path in paths if not any(path.startswith(f"{other}.") for other in paths)]


def rows_in(spec: MethodSpec) -> list[int]:
    """Return the table rows that a spec trains; empty if it trains no rows."""
    return list(getattr(spec, "rows", None) or ())


def computes_otherwise(module: nn.Module, table: PeftFormat) -> bool:
    """Return whether a module is a convolution at which peft computes something else than a map of every patch."""
    if table.kernels == "any" or not isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        return False
    if table.kernels == "ungrouped":
        return module.groups > 1
    even = all(len(set(sizes)) == 1 for sizes in (module.kernel_size, module.stride, module.padding))
    plain = even and not isinstance(module.padding, str) and module.groups == 1 and max(module.dilation) == 1
    return not plain or (table.kernels == "point" and max(module.kernel_size) > 1)


def document_of(config: AdapterConfig) -> dict[str, Any]:
    """Return the fields of the whole spec that a config sets."""
    _, table = config.format
    values = {name: config.value(name) for name in table.document}
    return {name: tuple(map(tuple, value)) for name, value in values.items() if value}


def base_of(compilation: Compilation) -> nn.Module:
    """Return the model that peft adapts: the source, or the deeper model that the spec makes of its layers."""
    return compilation.model if compilation.spec.layer_replication else compilation.source


def behind_an_encoder(model: nn.Module, structure: Callable[[], Structure]) -> dict[str, Any]:
    """Return the target of peft's virtual keys in an encoder-decoder model: the decoder's self-attention."""
    cross = [f.module for f in structure().findings if f.kind is SiteKind.ATTENTION and "cross." in f.role]
    return {"role": "decoder.attn", "exclude": globs(dict.fromkeys(cross), paths_of(model))}


def spec_of_entries(
    adapt: Iterable[Mapping[str, Any]], train: Collection[str], untie: Collection[str], model: nn.Module
) -> Spec:
    """Return a spec that has the given entries, trains some of a model's modules and unties others."""
    paths = paths_of(model)
    more = {"train": globs(train, paths)} if train else {}
    more |= {"untie": globs(untie, paths)} if untie else {}
    return Spec.model_validate({"version": 1, "adapt": list(adapt), **more})
