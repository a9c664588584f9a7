"""Translate the keys of peft checkpoints to modules and methods' parts, and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from graftc.specs.foreign.config import AdapterConfig, beside
from graftc.specs.peft import PeftFormat

ROOT = "base_model."
MODEL = "base_model.model."
_BASE = "base_layer"


@dataclass
class Keys:
    """A checkpoint's keys, sorted by kind.

    Attributes:
        modules: key of each part, by module and by the number of other adapters that wrap it there.
        inside: modules whose keys pass through another adapted module, each mapped to that module.
        tokens: keys of trained rows of embedding tables, by module, if they are stored along with another method.
        shared: keys of tensors that belong to the adaptation as a whole, by part.
        joined: key of the single tensor with the virtual tokens.
        plain: keys of tensors that the base has as well, by the base's names.
        again: additional keys for tensors in `plain`, each with the base's name.
        unused: keys of base values that nothing reads.
        unknown: all other keys.
    """

    modules: dict[tuple[str, int], dict[str, str]] = field(default_factory=dict)
    inside: dict[str, str] = field(default_factory=dict)
    tokens: dict[str, str] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    joined: str | None = None
    plain: dict[str, str] = field(default_factory=dict)
    again: list[tuple[str, str]] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)


def parts_by_key(table: PeftFormat) -> dict[str, str]:
    """Return graftc's part for each key suffix in a table, longest suffixes first."""
    parts = {key: part for part, own in table.parts.items() for key in own.keys}
    return dict(sorted(parts.items(), key=lambda item: -len(item[0])))


def parse(keys: Iterable[str], config: AdapterConfig) -> Keys:
    """Sort a checkpoint's keys by kind."""
    _, table = config.format
    sorted_keys = Keys()
    parts, tokens = parts_by_key(table), beside()[2]
    shared = {f"{ROOT}{theirs}": ours for ours, theirs in table.shared.items()}
    joined = table.joined[0] if table.joined is not None else None
    prefix = MODEL if joined is None else ROOT
    for key in keys:
        path = key.removeprefix(prefix)
        if key == joined:
            sorted_keys.joined = key
        elif key in shared:
            sorted_keys.shared[shared[key]] = key
        elif not key.startswith(prefix):
            sorted_keys.unknown.append(key)
        elif (owner := _behind(path, tokens)) is not None and tokens not in parts:
            sorted_keys.tokens[owner] = key
        elif joined is None and (hit := next((s for s in parts if _behind(path, s) is not None), None)) is not None:
            module, depth, around = _unwrapped(path.removesuffix(f".{hit}"))
            if around:
                sorted_keys.inside[module] = around
            sorted_keys.modules.setdefault((module, depth), {})[parts[hit]] = key
        else:
            _sort_plain(sorted_keys, path, key)
    return sorted_keys


def _behind(path: str, suffix: str) -> str | None:
    return path.removesuffix(f".{suffix}") if path.endswith(f".{suffix}") else None


def _unwrapped(path: str) -> tuple[str, int, str]:
    """Return the module, the number of adapters that wrap its tensor, and the adapted module around it, if any."""
    segments = path.split(".")
    depth = 0
    while segments and segments[-1] == _BASE:
        segments.pop()
        depth += 1
    outer = segments[: len(segments) - segments[::-1].index(_BASE) - 1] if _BASE in segments else []
    plain, around = ([segment for segment in own if segment != _BASE] for own in (segments, outer))
    return ".".join(plain), depth, ".".join(around)


def _sort_plain(keys: Keys, path: str, key: str) -> None:
    segments = [segment for segment in path.split(".") if segment != _BASE]
    if "original_module" in segments:
        keys.unused.append(key)
    elif "modules_to_save" in segments:
        keys.again.append((".".join(s for s in segments if s != "modules_to_save"), key))
    else:
        name = ".".join(segments)
        if keys.plain.setdefault(name, key) != key:
            keys.again.append((name, key))


def tensor_key(
    module: str, suffix: str, depth: int = 0, *, prefix: str = MODEL, wrapped: Mapping[str, int] = MappingProxyType({})
) -> str:
    """Return the key of a module's tensor, wrapped by `depth` other adapters at that module.

    Modules along the path may be wrapped as well; `wrapped` maps each one to its number of wrappers.
    """
    segments = module.split(".")
    words: list[str] = []
    for end, segment in enumerate(segments, 1):
        words += [segment] if segment else []
        if end < len(segments):
            words += [_BASE] * wrapped.get(".".join(segments[:end]), 0)
    return prefix + ".".join([*words, *[_BASE] * depth, *([suffix] if suffix else [])])
