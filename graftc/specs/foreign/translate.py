"""Convert a peft config to the equivalent spec, without a model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields as dataclass_fields
from dataclasses import is_dataclass
from enum import Enum
from typing import Any

from graftc.specs.base import MethodSpec
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import quoted, some
from graftc.specs.foreign.config import AdapterConfig, beside, matching, read_config
from graftc.specs.foreign.fields import fields_of
from graftc.specs.foreign.starts import starts_of
from graftc.specs.patterns import as_items
from graftc.specs.target import Target

_PLAIN = re.compile(r"[\w.-]+")


def translate(source: object, where: str) -> dict[str, Any]:
    """Return the spec equivalent to a peft config, as plain data."""
    config = read_config(as_data(source), where)
    starts = starts_of(config, where)
    sides = {own.field: own.otherwise for own in config.format[1].lists.values()}
    entry = {**fields_of(config), **starts, **sides, **_target(config, where)}
    overrides = _overrides(config, where)
    adapt = [{**entry, **({"overrides": overrides} if overrides else {})}, *_rows(config)]
    train = [f"**.{name}" for name in config.modules_to_save or ()]
    return {"version": 1, "adapt": adapt, **({"train": train} if train else {})}


def as_data(source: object) -> dict[str, Any]:
    """Return a config's fields, or those of the only config in a mapping of configs by name.

    Raises:
        GraftError: GC073 if the mapping does not contain exactly one config.
    """
    if isinstance(source, Mapping) and "peft_type" not in source:
        configs = [value for value in source.values() if value is not None]
        if len(configs) != 1:
            hint = "pass one of them"
            raise GraftError(
                "GC073", f"expected the config of one adapter, got {len(configs)}: {some(list(source))}", hint=hint
            )
        source = configs[0]
    fields = source if isinstance(source, Mapping) else vars(source)
    if is_dataclass(source):  # peft stores more attributes on the object than the config's fields
        fields = {field.name: fields[field.name] for field in dataclass_fields(source) if field.name in fields}
    return {str(name): _plain(value) for name, value in fields.items() if not str(name).startswith("_")}


def _plain(value: Any) -> Any:
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, tuple):
        return list(value)
    return dict(value) if isinstance(value, Mapping) else value


def _refused(what: str, where: str, field: str, hint: str) -> GraftError:
    return GraftError("GC112", what, place=Place(where, path=field), hint=hint)


def _target(config: AdapterConfig, where: str) -> dict[str, Any]:
    """Return the adaptation's target, or an empty mapping if the method's own default applies."""
    spec_class, table = config.format
    if table.joined is not None:
        return {}
    target: dict[str, Any] = {}
    named = config.target_modules
    if named == "all-linear":
        hint = "name modules, or use a spec with roles: attn.{q,k,v,o} and ffn.{up,gate,down}"
        raise _refused("the layers selected by 'all-linear' depend on the model", where, "target_modules", hint)
    if isinstance(named, str):
        target["regex"] = named
    elif named or config.target_parameters:
        target["modules"] = [f"**.{name}" for name in (*(named or ()), *(config.target_parameters or ()))]
    elif "rows" in spec_class.model_fields:
        target["role"] = "embed"
    elif not _places_itself(spec_class):
        hint = "PEFT would choose modules by model type; name them"
        raise _refused("target_modules is not given", where, "target_modules", hint)
    if isinstance(config.exclude_modules, str):
        raise _refused("exclude_modules is a regular expression", where, "exclude_modules", "list module names")
    if config.exclude_modules:
        target["exclude"] = [f"**.{name}" for name in config.exclude_modules]
    if config.layers_pattern:
        hint = "leave it out: layers are found without it"
        raise _refused(
            f"layers_pattern {quoted(str(config.layers_pattern))} is not supported", where, "layers_pattern", hint
        )
    if config.layers_to_transform not in (None, []):
        target["layers"] = config.layers_to_transform
    return {"target": target} if target else {}


def _places_itself(spec_class: type[MethodSpec]) -> bool:
    default = spec_class.model_fields["target"].default
    return isinstance(default, Target) and default.has_selector


def _overrides(config: AdapterConfig, where: str) -> list[dict[str, Any]]:
    """Return the overrides for some modules; longer keys come first, since the first match applies."""
    _, table = config.format
    given = {ours: config.value(theirs) or {} for theirs, ours in table.patterns.items()}
    keys = list(dict.fromkeys(key for own in given.values() for key in own))
    strange = [key for key in keys if not _PLAIN.fullmatch(key)]
    if strange:
        hint = "write module names, or use overrides in a spec"
        field = next(theirs for theirs in table.patterns if strange[0] in (config.value(theirs) or {}))
        raise _refused(f"{field} contains the regular expression {quoted(strange[0])}", where, field, hint)
    overrides = []
    for key in sorted(keys, key=lambda key: -len(key)):
        hits = {ours: matching(list(own), key, config.matcher) for ours, own in given.items()}
        changes = {ours: given[ours][hit] for ours, hit in hits.items() if hit is not None}
        overrides.append({"modules": f"**.{key}", **changes})
    for theirs, own in table.lists.items():
        listed: Sequence[str] = as_items(config.value(theirs))
        if isinstance(config.value(theirs), str):
            raise _refused(f"{theirs} is a regular expression", where, theirs, "list module names")
        overrides += [{"modules": f"**.{name}", own.field: own.listed} for name in listed]
    return overrides


def _rows(config: AdapterConfig) -> list[dict[str, Any]]:
    """Return the adaptations for table rows that train along with the method."""
    given = config.trainable_token_indices
    tag = beside()[0].tag()
    if isinstance(given, Mapping):
        return [{"method": tag, "rows": rows, "target": {"modules": f"**.{name}"}} for name, rows in given.items()]
    return [] if not given else [{"method": tag, "rows": given, "target": {"role": "embed"}}]
