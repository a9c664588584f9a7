"""From a target to sites: all patterns match and all counts hold, or an error says what came closest.

Torch-free: it sees candidates, not graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graftc.compiler.resolve.candidates import Candidate, depths
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import quoted, some
from graftc.specs.overrides import check_used
from graftc.specs.patterns import (
    as_items,
    count_sites,
    expand_braces,
    glob_to_regex,
    layer_indices,
    match_modules,
    suggest,
    write_items,
    write_layers,
)
from graftc.specs.regexes import RegexMatcher
from graftc.specs.roles import ROLES, parse_role
from graftc.specs.target import Target

__all__ = ["Candidate", "check_overrides", "depths", "match_modules", "select"]

_LAYERED = ("attn", "ffn", "layer")
_DETAILS = 8
"""How many reasons a near miss is explained with."""

Missing = Callable[[tuple[str, int] | None], Sequence[str]]


@dataclass(frozen=True)
class _Pattern:
    """One brace branch of one item of a target, and the places it matches."""

    field: str
    path: str
    written: str
    branch: str
    hits: frozenset[Hashable]

    @property
    def shown(self) -> str:
        return (
            quoted(self.branch) if self.branch == self.written else f"{quoted(self.branch)} of {quoted(self.written)}"
        )

    @property
    def counted(self) -> str:
        return f"{self.field} {self.shown} matches {count_sites(len(self.hits))}"


def select(
    target: Target,
    candidates: Sequence[Candidate],
    where: str = "target",
    *,
    kinds: Collection[SiteKind] | None = None,
    method: str = "the method",
    missing: Missing = lambda spot: (),
    matcher: RegexMatcher | None = None,
) -> list[Candidate]:
    """The candidates that a target means, in their order.

    Args:
        target: what to select.
        candidates: all places of the model, each with its own key.
        where: path of the target in the spec, for errors: ``adapt[0].target``.
        kinds: the kinds of site that the method takes; None for all.
        method: the method's tag, for errors.
        missing: what has no role in a layer (stack and number; None for the whole model) and why: what a near miss is
            explained with.
        matcher: matches regular expressions; shared by the targets of a spec, which have their time together.

    Raises:
        GraftError: GC008 where a regular expression takes too long; GC011 where a glob, regex, list item, brace
            branch, layer or exclusion matches nothing, or narrowing leaves it without a site; GC013 where ``expect``
            is not met; GC014 where nothing is left; GC015 where the model, or some layers of a stack, have no such
            role; GC016 where the method does not take what matches. Places hold paths; ``Spec.locate`` adds line and
            column.
    """
    return _Selection(target, candidates, where, kinds, method, missing, matcher or RegexMatcher()).run()


class _Selection:
    def __init__(
        self,
        target: Target,
        candidates: Sequence[Candidate],
        where: str,
        kinds: Collection[SiteKind] | None,
        method: str,
        missing: Missing,
        matcher: RegexMatcher,
    ) -> None:
        self.target, self.all, self.where, self.method = target, list(candidates), where, method
        self.missing, self.matcher = missing, matcher
        self.kinds = None if kinds is None else frozenset(kinds)
        whole = {c.module for c in self.all if not c.part and c.kind is not SiteKind.PARAMETER}
        by_module = target.role is None
        self.pool = [c for c in self.all if self.takes(c) and not (by_module and c.part and c.module in whole)]
        self.depths = depths(self.all)

    def takes(self, candidate: Candidate) -> bool:
        return self.kinds is None or candidate.kind in self.kinds

    def run(self) -> list[Candidate]:
        patterns = [*self.roles(), *self.paths("modules"), *self.paths("regex")]
        chosen = self.conjunction(patterns)
        stages = [("matched", len(chosen))]
        kept = self.narrow_layers(chosen)
        if self.target.layers is not None:
            stages.append(("in the layers", len(kept)))
        final = self.exclude(chosen, kept)
        if self.target.exclude is not None:
            stages.append(("not excluded", len(final)))
        if not final:
            facts = ", ".join(f"{count} {stage}" for stage, count in stages)
            raise _error("GC014", f"the target selects no site: {facts}", self.where)
        self.all_survive(patterns, kept, "layers", f"layers: {write_items(self.target.layers)}")
        self.all_survive(patterns, final, "exclude", f"exclude: {write_items(self.target.exclude)}")
        self.check_count(final, patterns)
        return final

    # What the selectors match

    def roles(self) -> list[_Pattern]:
        out = []
        for path, text in _items(self.target.role, f"{self.where}.role"):
            for branch in expand_braces(text):
                parse_role(branch, Place(path=path))
                hits = frozenset(c.key for c in self.pool if branch in c.roles)
                if not hits:
                    raise self.no_such_role(branch, path)
                out.append(_Pattern("role", path, text, branch, hits))
        return out

    def paths(self, field: str) -> list[_Pattern]:
        out: list[_Pattern] = []
        modules = [c.module for c in self.pool]
        names = list(dict.fromkeys(name for c in self.all for name in c.paths))
        for path, text in _items(getattr(self.target, field), f"{self.where}.{field}"):
            for branch in expand_braces(text) if field == "modules" else [text]:
                if field == "modules":
                    fitting = {name for name in names if glob_to_regex(branch).fullmatch(name)}
                else:
                    fitting = self.matcher.matching(branch, names, Place(path=path))
                hits = frozenset(c.key for c in self.pool if not fitting.isdisjoint(c.paths))
                if not hits:
                    others = [c for c in self.all if not fitting.isdisjoint(c.paths)]
                    if others:
                        hint, fix = suggest(branch, text, modules) if field == "modules" else (None, None)
                        raise self.wrong_kind(f"{field} {quoted(branch)}", others, path, hint, fix)
                    raise self.no_match(_Pattern(field, path, text, branch, hits), out)
                out.append(_Pattern(field, path, text, branch, hits))
        return out

    def conjunction(self, patterns: list[_Pattern]) -> list[Candidate]:
        keys: set[Hashable] = {c.key for c in self.pool}
        fields = list(dict.fromkeys(p.field for p in patterns))
        for field in fields:
            keys &= frozenset[Hashable]().union(*(p.hits for p in patterns if p.field == field))
        for p in patterns:
            if not p.hits & keys:
                others = " and ".join(f for f in fields if f != p.field)
                message = f"{p.counted}, but none that {others} selects too"
                raise _error("GC011", message, p.path, "a site must meet every one of role, modules and regex")
        return [c for c in self.pool if c.key in keys]

    # Narrowing

    def narrow_layers(self, chosen: list[Candidate]) -> list[Candidate]:
        if self.target.layers is None:
            return chosen
        stacks = {c.stack for c in chosen if c.layer is not None}
        if not stacks:
            message = f"the target selects {count_sites(len(chosen))}, none of them in a layer that layers could name"
            raise _error("GC011", message, f"{self.where}.layers")
        kept: set[tuple[str, int]] = set()
        for path, entry in _items(self.target.layers, f"{self.where}.layers"):
            named = {(s, i) for s in stacks for i in layer_indices(entry, self.depths[s])}
            if not any((c.stack, c.layer) in named for c in chosen):
                message = f"layers entry {entry!r} matches none of {self.extent(stacks)}"
                raise _error("GC011", message, path)
            kept |= named
        return [c for c in chosen if (c.stack, c.layer) in kept]

    def extent(self, stacks: Collection[str]) -> str:
        parts = []
        for stack in sorted(stacks):
            last = self.depths[stack] - 1
            parts.append(f"the layers 0 to {last}" + (f" of '{stack}'" if stack else ""))
        return " and ".join(parts)

    def exclude(self, chosen: list[Candidate], kept: list[Candidate]) -> list[Candidate]:
        out: set[Hashable] = set()
        for path, text in _items(self.target.exclude, f"{self.where}.exclude"):
            for branch in expand_braces(text):
                fits = glob_to_regex(branch).fullmatch
                hits = {c.key for c in chosen if any(map(fits, c.paths))}
                if not hits:
                    p = _Pattern("exclude", path, text, branch, frozenset())
                    message = f"exclude {p.shown} matches none of the {count_sites(len(chosen))} selected"
                    hint, fix = suggest(branch, text, [c.module for c in chosen])
                    raise _error("GC011", message, path, hint=hint, fix=fix)
                out |= hits
        return [c for c in kept if c.key not in out]

    def all_survive(self, patterns: list[_Pattern], kept: list[Candidate], field: str, why: str) -> None:
        if getattr(self.target, field) is None:
            return
        keys = {c.key for c in kept}
        for p in patterns:
            if not p.hits & keys:
                raise _error("GC011", f"{p.counted}, but {why} leaves none of them", p.path)

    # Counting

    def check_count(self, final: list[Candidate], patterns: list[_Pattern]) -> None:
        expect = self.target.expect
        if expect == len(final):
            return  # a stated number that holds says that gaps are meant
        gaps = [gap for p in patterns if p.field == "role" and (gap := self.gap(p, patterns, len(final)))]
        if expect is not None:
            keys = {c.key for c in final}
            counts = [f"{p.field} {p.shown}: {count_sites(len(p.hits & keys))}" for p in patterns]
            message = f"the target selects {count_sites(len(final))}, expected {expect}"
            details = [*counts, *(g.message for g in gaps)]
            raise _error("GC013", message, f"{self.where}.expect", details=details)
        if gaps:
            raise gaps[0]

    def gap(self, p: _Pattern, patterns: list[_Pattern], count: int) -> GraftError | None:
        """Layers that should have a role but do not; not asked where modules are named one by one."""
        role = parse_role(p.branch)
        family = role.name.split(".")[0]
        if family not in _LAYERED or self.target.modules is not None or self.target.regex is not None:
            return None
        found = {spot for c in self.pool if c.key in p.hits and (spot := _spot(c))}
        stacks = {stack for stack, _ in found}
        every = {spot for c in self.all if (spot := _spot(c)) and spot[0] in stacks and self.asked(spot)}
        wanted = {spot for spot in every if spot in found or self.may_have(family, spot)}
        if "cross" in role.prefixes:  # a decoder may have cross-attention in some layers only
            stem = ".".join((*role.prefixes, family))
            has_it = (c for c in self.all if any(r == stem or r.startswith(f"{stem}.") for r in c.roles))
            wanted &= {spot for c in has_it if (spot := _spot(c))}
        if family == "ffn":  # experts stand in for a feed-forward where the target names them as well
            keys = frozenset[Hashable]().union(*(q.hits for q in patterns if q.branch.endswith("experts")))
            wanted -= {spot for c in self.pool if c.key in keys and (spot := _spot(c))} - found
        missing = sorted(wanted - found)
        if not missing:
            return None
        present = sorted(wanted & found)
        one = len(stacks) == 1
        names = [str(layer) if one or not stack else f"{stack}.{layer}" for stack, layer in missing]
        these = f"these {len(missing)} have" if len(missing) > 1 else "this one has"
        matched = f"'{p.branch}' matched {len(present)} of {len(wanted)} layers"
        message = f"{matched}; {these} none: {some(names)}"
        layers = f"layers: {write_layers([layer for _, layer in present])}, or " if one else ""
        hint = f"if that is meant, say so with {layers}expect: {count}"
        reasons = dict.fromkeys(reason for spot in missing for reason in self.missing(spot))
        return _error("GC015", message, p.path, hint=hint, details=list(reasons)[:_DETAILS])

    def may_have(self, family: str, spot: tuple[str, int]) -> bool:
        """Whether a layer has something of a family of roles, or a place of which nobody knows what it is. One that is
        all understood and has none, as the state-space layers of a hybrid model, misses nothing. Every layer reads
        something and gives something."""
        if family == "layer":
            return True
        stems = (family, "experts") if family == "ffn" else (family,)
        here = (role for c in self.all if _spot(c) == spot for role in c.roles)
        return any(role.split(".")[0] in stems for role in here) or bool(self.missing(spot))

    def asked(self, spot: tuple[str, int]) -> bool:
        entries = as_items(self.target.layers)
        return not entries or any(spot[1] in layer_indices(e, self.depths[spot[0]]) for e in entries)

    # Errors

    def no_such_role(self, branch: str, path: str) -> GraftError:
        others = [c for c in self.all if branch in c.roles]
        if others:
            inside = sorted({r for c in self.pool for r in c.roles if r.startswith(f"{branch}.")})
            hint = f"it could take: {', '.join(inside)}" if inside else None
            return self.wrong_kind(f"role '{branch}'", others, path, hint)
        present = {r for c in self.pool for r in c.roles}
        stem = "".join(f"{prefix}." for prefix in parse_role(branch).prefixes)
        spelled = [f"{stem}{r}" for r in ROLES if f"{stem}{r}" in present] or [r for r in ROLES if r in present]
        known = f"it has: {', '.join(spelled)}" if spelled else "it has none at all"
        hint = f"{known}; `graftc roles MODEL` says what was found and why"
        reasons = list(dict.fromkeys(self.missing(None)))[:_DETAILS]
        return _error("GC015", f"role '{branch}' is not in this model", path, hint, details=reasons)

    def wrong_kind(
        self,
        what: str,
        others: list[Candidate],
        path: str,
        hint: str | None = None,
        fix: tuple[str, str] | None = None,
    ) -> GraftError:
        if self.kinds is None or any(self.takes(c) for c in others):
            # Only rows of fused weights match, and a target by modules alone means whole modules.
            message = f"{what} matches {count_sites(len(others))}, all of them rows of a fused weight"
            return _error("GC011", message, path, "name the role as well, for example role: attn.q")
        kinds = Counter(str(c.kind) for c in others)
        found = ", ".join(f"{n} {kind}" for kind, n in sorted(kinds.items()))
        *most, last = sorted(str(k) for k in self.kinds)
        wanted = f"{', '.join(most)} and {last}" if most else last
        message = f"{what} matches {count_sites(len(others))} ({found}), but {self.method} takes {wanted} sites"
        return _error("GC016", message, path, hint, fix)

    def no_match(self, p: _Pattern, patterns: list[_Pattern]) -> GraftError:
        message = f"{p.field} {p.shown} matches none of the {count_sites(len(self.pool))}"
        if self.kinds is not None:
            message += f" that {self.method} can take"
        modules = [c.module for c in self.pool]
        if p.field == "modules":
            hint, fix = suggest(p.branch, p.written, modules)
        else:
            loose = bool(self.matcher.matching(p.branch, modules, Place(path=p.path), anywhere=True))
            hint, fix = ("it must match the whole path: begin it with .*" if loose else None), None
        counts = [f"{q.field} {q.shown}: {count_sites(len(q.hits))}" for q in patterns if q.field == p.field]
        return _error("GC011", message, p.path, hint=hint, fix=fix, details=counts)


# Overrides


def check_overrides(
    spec: MethodSpec,
    selected: Sequence[Candidate],
    where: str = "adapt",
    *,
    depth: Mapping[str, int] | None = None,
) -> None:
    """Make sure that every override of an adaptation, and every pattern in it, is used.

    Args:
        spec: the adaptation.
        selected: what :func:`select` gave for its target.
        where: path of the adaptation in the spec, for errors: ``adapt[0]``.
        depth: layers of each stack, from :func:`depths` of all candidates; default from ``selected``.

    Raises:
        GraftError: GC011 naming the override, or the pattern of it that matches nothing.
    """
    check_used(spec.override_list(), selected, depths(selected) if depth is None else depth, f"{where}.overrides")


# Small words


def _error(
    code: str,
    message: str,
    path: str,
    hint: str | None = None,
    fix: tuple[str, str] | None = None,
    details: Sequence[str] = (),
) -> GraftError:
    return GraftError(code, message, place=Place(path=path), hint=hint, fix=fix, details=details)


def _spot(c: Candidate) -> tuple[str, int] | None:
    return None if c.layer is None else (c.stack, c.layer)


def _items(value: object, path: str) -> list[tuple[str, Any]]:
    """The items of a field, each with its path."""
    if isinstance(value, (list, tuple)):
        return [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    return [(path, item) for item in as_items(value)]
