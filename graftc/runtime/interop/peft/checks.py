"""Check a peft folder against a base, for imports and for merges that stream files.

Everything that the config defines must be in the file, and everything in the file must fit this base.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from graftc.runtime.interop.peft.base import computes_otherwise
from graftc.runtime.interop.peft.folder import PeftAdapter
from graftc.runtime.interop.peft.parameters import meant_parameters
from graftc.runtime.interop.peft.targets import is_saved, meant
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import some
from graftc.specs.foreign.config import AdapterConfig
from graftc.specs.foreign.fields import takes_bias

SHOWN = 50
"""Maximum number of details that an error lists."""


def token_keys(adapter: PeftAdapter) -> set[str]:
    """Return the keys of trained rows that are stored in addition to the method's tensors."""
    return set(adapter.keys.tokens.values())


def check_contents(adapter: PeftAdapter, modules: Sequence[str], parameters: Mapping[str, Tensor]) -> None:
    """Raise if a file has more or less than its config and the base require.

    Args:
        adapter: the folder.
        modules: paths of the base's modules.
        parameters: the base's parameters, tied ones under each of their names; values are not read.

    Raises:
        GraftError: GC112 if `target_modules` is null; GC113, which lists the modules or tensors that do not match.
    """
    _check_targets(adapter, modules)
    _check_parameters(adapter, parameters)
    lacking = [f"{name}: trained by the config, but not in the file" for name in _trained(adapter, modules, parameters)]
    rows = adapter.config.trainable_token_indices
    if rows and not adapter.keys.tokens:
        lacking.append("trainable_token_indices: the file has no rows")
    if lacking:
        message = lacking[0] if len(lacking) == 1 else f"the file lacks {len(lacking)} tensors that the config trains"
        raise GraftError("GC113", message, place=adapter.place, details=lacking[:SHOWN] if len(lacking) > 1 else [])


def check_convolutions(config: AdapterConfig, where: Place, adapted: Iterable[tuple[str, nn.Module]]) -> None:
    """Raise if a config adapts a convolution at which peft computes something that has no equivalent here.

    Args:
        config: the config.
        where: the place of its ``target_modules``, for errors.
        adapted: the modules that it adapts, by path.

    Raises:
        GraftError: GC112, which names the module.
    """
    if strange := [path for path, module in adapted if computes_otherwise(module, config.format[1])]:
        message = f"PEFT's {config.peft_type} at {strange[0]} is not a map of every patch, so it has no equivalent here"
        hint = "leave convolutions out of target_modules, or merge the adapter in PEFT"
        raise GraftError("GC112", message, place=where, hint=hint, details=strange[1:SHOWN])


def _check_targets(adapter: PeftAdapter, modules: Sequence[str]) -> None:
    named = meant(adapter.config, modules)
    own = {m.path for m in adapter.modules if not (m.named or m.around) and set(m.keys.values()) - token_keys(adapter)}
    if adapter.config.is_prompt:
        return
    if own and adapter.config.target_modules is None and not adapter.config.target_parameters:
        message = "target_modules is null: peft then adapts only its defaults for the model's class"
        hint = f"name the modules that have tensors in the file: {some(sorted({p.rpartition('.')[2] for p in own}))}"
        raise GraftError("GC112", message, place=adapter.in_config("target_modules"), hint=hint)
    if named is None:
        return
    _refuse_difference(adapter, "target_modules", "modules", own, named)


def _check_parameters(adapter: PeftAdapter, parameters: Iterable[str]) -> None:
    targets = adapter.config.target_parameters
    own = {m.name for m in adapter.modules if m.named}
    _refuse_difference(adapter, "target_parameters", "parameters", own, set(meant_parameters(targets, parameters)))


def _refuse_difference(adapter: PeftAdapter, field: str, kind: str, own: set[str], named: set[str]) -> None:
    more, fewer = sorted(own - named), sorted(named - own)
    if more or fewer:
        message = f"{field} and the file name different {kind}"
        details = [f"{path}: in the file, not selected by the config" for path in more]
        details += [f"{path}: selected by the config, not in the file" for path in fewer]
        raise GraftError("GC113", message, place=adapter.in_config(field), details=details[:SHOWN])


def _trained(adapter: PeftAdapter, modules: Sequence[str], parameters: Mapping[str, Tensor]) -> list[str]:
    """Return the parameters that the config trains in full but that the file lacks."""
    full = [path for path in modules if is_saved(adapter.config, path)]
    adapted = {module.path for module in adapter.modules}
    present = {id(parameters[name]) for name in adapter.trained if name in parameters}
    lacking = []
    for name, parameter in parameters.items():
        module, _, last = name.rpartition(".")
        in_full = any(name.startswith(f"{path}.") for path in full)
        trains = in_full or (last == "bias" and takes_bias(adapter.config, adapted, module))
        if trains and id(parameter) not in present:
            lacking.append(name)
    return lacking


def check_copies(adapter: PeftAdapter, base: Mapping[str, Sequence[int]], read: Callable[[str], Tensor | None]) -> None:
    """Raise if tensors that were saved along with the adapter differ from those of this base.

    Args:
        adapter: the folder.
        base: shapes of the base's parameters and buffers, by name.
        read: function that returns the base's tensor by name, or None if its values are not available.

    Raises:
        GraftError: GC113 for tensors that belong to neither the method nor the base, GC114 for tensors of another base.
    """
    unknown = [key for name, key in adapter.copies.items() if name not in base]
    if unknown:
        message = f"the file has tensors that {adapter.config.peft_type} does not have: {some(unknown, 5)}"
        raise GraftError("GC113", message, place=adapter.place, details=unknown[5:SHOWN])
    wrong: list[str] = []
    for name, key in adapter.copies.items():
        if tuple(base[name]) != adapter.shapes[key]:
            wrong.append(f"{name} is {list(base[name])}, but in the file it is {list(adapter.shapes[key])}")
            continue
        expected = read(name)
        if expected is not None and not torch.equal(adapter.tensor(key).to(expected.device, expected.dtype), expected):
            wrong.append(f"{name} has different values")
    for first, key in adapter.doubles:
        if not torch.equal(adapter.tensor(first), adapter.tensor(key)):
            wrong.append(f"{first} and {key} differ")
    if wrong:
        message = f"the file holds tensors of another base: {wrong[0]}"
        hint = (
            "use the base that the adapter was trained on; if its vocabulary was resized, save the resized model first"
        )
        raise GraftError("GC114", message, place=adapter.place, details=wrong[1:SHOWN], hint=hint)
