"""Find a target that selects exactly the given places: try several forms and verify each with the resolver."""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from typing import Any

from graftc.compiler.resolve.matching import counted_kinds
from graftc.compiler.resolve.select import meant, select
from graftc.compiler.resolve.selectable import Selectable
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.errors.text import counted, listed, one_line, some
from graftc.specs.limits import TEXT
from graftc.specs.patterns import layer_entries, write_items
from graftc.specs.registry import method_specs, unknown_method
from graftc.specs.target import Candidate, Target, depths, written_fields

_SHOWN = 4
"""Maximum number of wrongly selected places, and of missing ones, that an error lists."""

Keys = frozenset[Hashable]


def kinds_of(method: object) -> frozenset[SiteKind]:
    """Return the kinds of site that a method takes.

    Raises:
        GraftError: GC004 if the method is unknown.
    """
    entry = method_specs().get(method) if isinstance(method, str) else None
    if entry is None:
        raise unknown_method(method)
    return entry.claims.sites


def exact_target(places: Selectable, keys: Keys, written: Target | None, method: str | None) -> Target:
    """Return a target that selects exactly some places of a model, as verified by the resolver.

    The target contains the number of places (``expect``), so that a method or model with a different number of them
    raises an error.

    Args:
        places: all places of the model.
        keys: keys of the places to select.
        written: fields that the user wrote to select them, which take precedence; None if there are none.
        method: the method that the target is for; None for any method that takes such sites.

    Raises:
        GraftError: GC004 for an unknown method; GC014 if ``keys`` is empty; GC016 for sites that the method does not
            take; GC017 and GC023 for a place that no method can adapt; GC093 if no target selects exactly these places;
            errors of ``written`` as for `graftc.compiler.resolve.select.select`.
    """
    if not keys:
        raise GraftError("GC014", "the selection is empty", hint="print it to see what came closest")
    chosen = [c for c in places.candidates if c.key in keys]
    for candidate in chosen:
        places.require_adaptable(places.places[candidate.key])
    present = frozenset(c.kind for c in chosen)
    kinds = present if method is None else kinds_of(method)
    if not present <= kinds:
        raise _not_taken(chosen, kinds, str(method))
    if written is not None:
        default = {} if written.has_selector else {"modules": "**"}
        target = Target(**{**default, **written_fields(written), "expect": len(keys)})
        same = select(target, places.candidates, kinds=kinds, missing=places.missing, method=method or "the method")
        if frozenset(c.key for c in same) == keys:
            return target
    others = {e.claims.sites for e in method_specs().values() if present <= e.claims.sites} - {kinds}
    wider = [sites for sites in others if method is None]
    first_exact: Target | None = None
    misses: list[str] = []
    for fields in _forms(chosen, [c for c in places.candidates if c.kind in kinds]):
        try:
            target = Target(**fields, expect=len(keys))
            miss = _miss(places, target, kinds, keys)
        except GraftError as error:  # a name that no pattern can contain
            miss = error.message
        if miss is not None:
            misses.append(f"{_said(fields)}: {miss}")
            continue
        first_exact = first_exact or target
        if all(_miss(places, target, sites, keys) is None for sites in wider):
            return target
    if first_exact is None:
        message = f"no target selects exactly these {counted(len(keys))}"
        hint = "split the selection, by role for example, and write an adaptation for each part"
        raise GraftError("GC093", message, hint=hint, details=misses)
    return first_exact


def _miss(places: Selectable, target: Target, kinds: Collection[SiteKind], keys: Keys) -> str | None:
    """Return the reason why the resolver would not select exactly these places; None if it would."""
    try:
        result = meant(target, places.candidates, kinds=kinds, missing=places.missing)
    except GraftError as error:
        return error.message
    got = frozenset(c.key for c in result.chosen)
    if got != keys:
        return _difference(places, keys, got)
    return result.faults[0].message if result.faults else None


def _covering(chosen: Sequence[Candidate], pool: Iterable[Candidate]) -> list[str]:
    """Return a few roles, chosen greedily, that cover all chosen sites and no others in ``pool``; empty if none can."""
    keys = {c.key for c in chosen}
    hits: dict[str, set[Hashable]] = {role: set() for c in chosen for role in sorted(c.roles)}
    for c in pool:
        for role in c.roles & hits.keys():
            hits[role].add(c.key)
    exact = {role: hit for role, hit in hits.items() if hit <= keys}
    roles: list[str] = []
    left = set(keys)
    while left:
        best = max(exact, key=lambda role: (len(exact[role] & left), -len(role), role), default=None)
        if best is None or not exact[best] & left:
            return []
        roles.append(best)
        left -= exact[best]
    return sorted(roles, key=list(hits).index)


def _forms(chosen: Sequence[Candidate], pool: Sequence[Candidate]) -> Iterator[dict[str, Any]]:
    """Yield the fields of possible targets for some places, the most descriptive first, without checking them."""
    if roles := _covering(chosen, pool):
        yield {"role": _one(roles)}
    layers = {c.layer for c in chosen if c.layer is not None}
    in_layers = all(c.layer is not None for c in chosen)
    if in_layers and (roles := _covering(chosen, (c for c in pool if c.layer in layers))):
        yield {"role": _one(roles), "layers": _one(layer_entries(sorted(layers)))}
    paths = list(dict.fromkeys(c.paths[-1] for c in chosen))
    named = _named(paths, chosen, pool)
    yield named
    if roles := _covering(chosen, (c for c in pool if not set(paths).isdisjoint(c.paths))):
        yield {"role": _one(roles), **named}


def _named(paths: Sequence[str], chosen: Sequence[Candidate], pool: Sequence[Candidate]) -> dict[str, Any]:
    """Return paths as globs that combine equal layers, or as regular expressions if a path contains glob characters."""
    if any(mark in path for path in paths for mark in "*{},"):
        return {"regex": _one([re.escape(path) for path in paths])}
    deep = depths(pool)
    groups: dict[tuple[str, str, str], dict[int, str]] = {}
    for c in chosen:
        path, number = c.paths[-1], f"{c.stack}.{c.layer}".lstrip(".")
        layered = c.layer is not None and f"{path}.".startswith(f"{number}.")
        key = (c.stack, path[len(number) :], "") if layered else ("", "", path)
        groups.setdefault(key, {})[c.layer or 0] = path
    patterns: list[str] = []
    for (stack, rest, alone), by_layer in groups.items():
        numbers = "*" if len(by_layer) == deep.get(stack) else "{" + ",".join(map(str, sorted(by_layer))) + "}"
        pattern = f"{stack}.{numbers}{rest}".lstrip(".")
        patterns += (
            [alone] if alone else [pattern] if len(by_layer) > 1 and len(pattern) <= TEXT else list(by_layer.values())
        )
    return {"modules": _one(patterns)}


def _one(items: Sequence[Any]) -> Any:
    return items[0] if len(items) == 1 else list(items)


def _said(fields: dict[str, Any]) -> str:
    """Return a target's fields as they may appear in a spec, shortened."""
    return one_line(
        ", ".join(
            f"{name}: {write_items(tuple(value) if isinstance(value, list) else value)}"
            for name, value in fields.items()
        )
    )


def _difference(places: Selectable, keys: Keys, got: Keys) -> str:
    """Return a description of the places that are in only one of two sets."""
    parts = []
    for what, only in (("also selects", got - keys), ("leaves out", keys - got)):
        names = [one_line(p.name) for key, p in places.places.items() if key in only]
        parts += [f"{what} {some(names, _SHOWN)}"] if names else []
    return "; ".join(parts)


def _not_taken(chosen: Sequence[Candidate], kinds: Collection[SiteKind], method: str) -> GraftError:
    unwanted = counted_kinds(c for c in chosen if c.kind not in kinds)
    wanted = listed(sorted(map(str, kinds)))
    hint = f"graftc.select(model, method={method!r}) selects only what {method} takes"
    return GraftError("GC016", f"the selection has {unwanted} sites, but {method} takes {wanted} sites", hint=hint)
