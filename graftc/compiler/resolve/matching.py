"""Match and count a target's patterns, and build the errors for patterns that match nothing.

Torch-free: it works on candidates, not graphs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Sequence
from dataclasses import dataclass, field

from graftc.specs.claims import SiteKind
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.errors.text import counted, listed, quoted, some
from graftc.specs.patterns import (
    as_items,
    branches,
    glob_to_regex,
    layer_indices,
    quoted_branch,
    suggest,
    write_items,
    write_layers,
)
from graftc.specs.regexes import RegexMatcher
from graftc.specs.roles import ROLES, parse_role
from graftc.specs.target import Candidate, Target, depths

_LAYERED = ("attn", "ffn", "layer")
_DETAILS = 8
"""Maximum number of reasons that an error for a near miss lists."""

Missing = Callable[[tuple[str, int] | None], Sequence[str]]


@dataclass(frozen=True)
class _Pattern:
    """One brace branch of one item of a target, with the places that it matches."""

    field: str
    path: str
    written: str
    branch: str
    hits: frozenset[Hashable]

    @property
    def shown(self) -> str:
        return quoted_branch(self.branch, self.written)

    @property
    def counted(self) -> str:
        return f"{self.field} {self.shown} matches {counted(len(self.hits))}"


@dataclass
class Meant:
    """The places that a target selects, with its errors collected instead of raised.

    Attributes:
        chosen: the selected candidates, in model order.
        faults: the errors, the first of which `select` raises.
        gaps: errors for layers that lack a role which other layers have; raised only if ``expect`` is not set.
    """

    chosen: list[Candidate] = field(default_factory=list)
    faults: list[GraftError] = field(default_factory=list)
    gaps: list[GraftError] = field(default_factory=list)


@dataclass(frozen=True)
class ForMethod:
    """The method that a target is matched for.

    Attributes:
        kinds, method, missing: as for `graftc.compiler.resolve.select.select`.
    """

    kinds: Collection[SiteKind] | None
    method: str
    missing: Missing


class Matching:
    """Matches one target against the candidates of one model.

    Args:
        target, candidates, where, matcher: as for `graftc.compiler.resolve.select.select`.
        method: the method that the target is for.
        meant: collects the target's errors; if None, the first error is raised.
        within: the keys of the candidates to choose from; by default all.
    """

    def __init__(
        self,
        target: Target,
        candidates: Sequence[Candidate],
        where: str,
        method: ForMethod,
        matcher: RegexMatcher,
        meant: Meant | None = None,
        within: Collection[Hashable] | None = None,
    ) -> None:
        self.meant, self.within = meant, None if within is None else frozenset(within)
        self.target, self.all, self.where, self.method = target, list(candidates), where, method.method
        self.missing, self.matcher = method.missing, matcher
        self.kinds = None if method.kinds is None else frozenset(method.kinds)
        whole = {c.module for c in self.all if not c.part and c.kind is not SiteKind.PARAMETER}
        by_module = target.role is None and within is None
        self.pool = [c for c in self.all if self.takes(c) and not (by_module and c.part and c.module in whole)]
        self.depths = depths(self.all)

    def takes(self, candidate: Candidate) -> bool:
        """Return whether a candidate may be chosen and has a kind that the method takes."""
        inside = self.within is None or candidate.key in self.within
        return inside and (self.kinds is None or candidate.kind in self.kinds)

    def refuse(self, error: GraftError) -> None:
        """Raise an error, or record it if the target is still being written."""
        if self.meant is None:
            raise error
        self.meant.faults.append(error)

    def run(self) -> list[Candidate]:
        """Return the candidates that the target selects, in model order."""
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
            if self.meant is None or not self.meant.faults:
                self.refuse(_error("GC014", f"the target selects no site: {facts}", self.where))
            return final
        self.all_survive(patterns, kept, "layers", f"layers: {write_items(self.target.layers)}")
        self.all_survive(patterns, final, "exclude", f"exclude: {write_items(self.target.exclude)}")
        self.check_count(final, patterns)
        return final

    # Selectors

    def roles(self) -> list[_Pattern]:
        out = []
        for path, text, branch in branches(self.target.role, f"{self.where}.role"):
            parse_role(branch, Place(path=path))
            hits = frozenset(c.key for c in self.pool if branch in c.roles)
            if not hits:
                self.refuse(self.no_such_role(branch, path))
            out.append(_Pattern("role", path, text, branch, hits))
        return out

    def paths(self, field: str) -> list[_Pattern]:
        out: list[_Pattern] = []
        modules = [c.module for c in self.pool]
        names = list(dict.fromkeys(name for c in self.all for name in c.paths))
        globs = field == "modules"
        for path, text, branch in branches(getattr(self.target, field), f"{self.where}.{field}", braces=globs):
            if globs:
                fitting = {name for name in names if glob_to_regex(branch).fullmatch(name)}
            else:
                fitting = self.matcher.matching(branch, names, Place(path=path))
            hits = frozenset(c.key for c in self.pool if not fitting.isdisjoint(c.paths))
            others = [c for c in self.all if not hits and not fitting.isdisjoint(c.paths)]
            pattern = _Pattern(field, path, text, branch, hits)
            if others:
                hint, fix = suggest(branch, text, modules) if globs else (None, None)
                self.refuse(self.wrong_kind(f"{field} {quoted(branch)}", others, path, hint, fix))
            elif not hits:
                self.refuse(self.no_match(pattern, out))
            out.append(pattern)
        return out

    def conjunction(self, patterns: list[_Pattern]) -> list[Candidate]:
        keys: set[Hashable] = {c.key for c in self.pool}
        fields = list(dict.fromkeys(p.field for p in patterns))
        for name in fields:
            keys &= frozenset[Hashable]().union(*(p.hits for p in patterns if p.field == name))
        for p in patterns:
            if p.hits and not p.hits & keys:
                others = " and ".join(f for f in fields if f != p.field)
                message = f"{p.counted}, but none that {others} also selects"
                self.refuse(_error("GC011", message, p.path, "a site must match all of role, modules and regex"))
        return [c for c in self.pool if c.key in keys]

    # Narrowing

    def narrow_layers(self, chosen: list[Candidate]) -> list[Candidate]:
        if self.target.layers is None:
            return chosen
        stacks = {c.stack for c in chosen if c.layer is not None}
        if not stacks:
            message = f"the target selects {counted(len(chosen))}, none of them in a layer that layers can select"
            if chosen or self.meant is None:
                self.refuse(_error("GC011", message, f"{self.where}.layers"))
            return []
        kept: set[tuple[str, int]] = set()
        for path, entry, _ in branches(self.target.layers, f"{self.where}.layers", braces=False):
            named = {(s, i) for s in stacks for i in layer_indices(entry, self.depths[s])}
            if not any((c.stack, c.layer) in named for c in chosen):
                self.refuse(_error("GC011", f"layers entry {entry!r} matches none of {self.extent(stacks)}", path))
            kept |= named
        return [c for c in chosen if (c.stack, c.layer) in kept]

    def extent(self, stacks: Collection[str]) -> str:
        lasts = [(stack, self.depths[stack] - 1) for stack in sorted(stacks)]
        return " and ".join(f"the layers 0 to {last}" + (f" of '{stack}'" if stack else "") for stack, last in lasts)

    def exclude(self, chosen: list[Candidate], kept: list[Candidate]) -> list[Candidate]:
        out: set[Hashable] = set()
        for path, text, branch in branches(self.target.exclude, f"{self.where}.exclude"):
            fits = glob_to_regex(branch).fullmatch
            hits = {c.key for c in chosen if any(map(fits, c.paths))}
            if not hits and (chosen or self.meant is None):
                shown, count = quoted_branch(branch, text), counted(len(chosen))
                hint, fix = suggest(branch, text, [c.module for c in chosen])
                message = f"exclude {shown} matches none of the {count} selected"
                self.refuse(_error("GC011", message, path, hint=hint, fix=fix))
            out |= hits
        return [c for c in kept if c.key not in out]

    def all_survive(self, patterns: list[_Pattern], kept: list[Candidate], field: str, why: str) -> None:
        if getattr(self.target, field) is None:
            return
        keys = {c.key for c in kept}
        for p in patterns:
            if p.hits and not p.hits & keys:
                self.refuse(_error("GC011", f"{p.counted}, but {why} leaves none of them", p.path))

    # Counting

    def check_count(self, final: list[Candidate], patterns: list[_Pattern]) -> None:
        expect = self.target.expect
        if expect == len(final):
            return  # if the expected number is met, gaps are intended
        gaps = [gap for p in patterns if p.field == "role" and (gap := self.gap(p, patterns, len(final)))]
        if expect is not None:
            keys = {c.key for c in final}
            counts = [f"{p.field} {p.shown}: {counted(len(p.hits & keys))}" for p in patterns]
            message = f"the target selects {counted(len(final))}, expected {expect}"
            details = [*counts, *(g.message for g in gaps)]
            self.refuse(_error("GC013", message, f"{self.where}.expect", details=details))
        elif self.meant is not None:
            self.meant.gaps += gaps if self.within is None else []
        elif gaps:
            raise gaps[0]

    def gap(self, p: _Pattern, patterns: list[_Pattern], count: int) -> GraftError | None:
        """Return the error for layers that lack an expected role; None if none do, or if the target uses paths."""
        role = parse_role(p.branch)
        family = role.name.split(".")[0]
        if family not in _LAYERED or self.target.modules is not None or self.target.regex is not None:
            return None
        with_role = {spot for c in self.pool if c.key in p.hits and (spot := _spot(c))}
        stacks = {stack for stack, _ in with_role}
        every = {spot for c in self.all if (spot := _spot(c)) and spot[0] in stacks and self.is_wanted(spot)}
        wanted = {spot for spot in every if spot in with_role or self.may_have(family, spot)}
        if "cross" in role.prefixes:  # a decoder may have cross-attention only in some layers
            stem = ".".join((*role.prefixes, family))
            has_it = (c for c in self.all if any(r == stem or r.startswith(f"{stem}.") for r in c.roles))
            wanted &= {spot for c in has_it if (spot := _spot(c))}
        if family == "ffn":  # experts replace a feed-forward part if the target also names them
            keys = frozenset[Hashable]().union(*(q.hits for q in patterns if q.branch.endswith("experts")))
            wanted -= {spot for c in self.pool if c.key in keys and (spot := _spot(c))} - with_role
        missing = sorted(wanted - with_role)
        if not missing:
            return None
        present = sorted(wanted & with_role)
        one = len(stacks) == 1
        names = [str(layer) if one or not stack else f"{stack}.{layer}" for stack, layer in missing]
        these = f"these {len(missing)} have" if len(missing) > 1 else "this one has"
        matched = f"'{p.branch}' matched {len(present)} of {len(wanted)} layers"
        message = f"{matched}; {these} none: {some(names)}"
        layers = f"layers: {write_layers([layer for _, layer in present])}, or " if one else ""
        hint = f"if that is intended, set {layers}expect: {count}"
        reasons = dict.fromkeys(reason for spot in missing for reason in self.missing(spot))
        return _error("GC015", message, p.path, hint=hint, details=list(reasons)[:_DETAILS])

    def may_have(self, family: str, spot: tuple[str, int]) -> bool:
        """Return whether a layer has a role of a family, or a place whose role is unknown.

        A layer whose roles are all known and outside the family, such as a state-space layer in a hybrid model,
        lacks nothing. Every layer has an input and an output.
        """
        if family == "layer":
            return True
        stems = (family, "experts") if family == "ffn" else (family,)
        roles = (role for c in self.all if _spot(c) == spot for role in c.roles)
        return any(role.split(".")[0] in stems for role in roles) or bool(self.missing(spot))

    def is_wanted(self, spot: tuple[str, int]) -> bool:
        entries = as_items(self.target.layers)
        return not entries or any(spot[1] in layer_indices(e, self.depths[spot[0]]) for e in entries)

    # Errors

    def no_such_role(self, branch: str, path: str) -> GraftError:
        others = [c for c in self.all if branch in c.roles]
        if others and self.within is None:
            inside = sorted({r for c in self.pool for r in c.roles if r.startswith(f"{branch}.")})
            hint = f"it can take: {', '.join(inside)}" if inside else None
            return self.wrong_kind(f"role '{branch}'", others, path, hint)
        if others:
            return self.outside(f"role '{branch}'", others, path)
        present = {r for c in self.pool for r in c.roles}
        stem = "".join(f"{prefix}." for prefix in parse_role(branch).prefixes)
        spelled = [f"{stem}{r}" for r in ROLES if f"{stem}{r}" in present] or [r for r in ROLES if r in present]
        known = f"it has: {', '.join(spelled)}" if spelled else "it has no roles"
        hint = f"{known}; `graftc roles MODEL` shows what was found and why"
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
        if self.within is not None:
            return self.outside(what, others, path)
        if self.kinds is None or any(self.takes(c) for c in others):
            # Only rows of fused weights match, but a target that names only modules selects whole modules.
            message = f"{what} matches {counted(len(others))}, all of them rows of a fused weight"
            return _error("GC011", message, path, "name the role as well, for example role: attn.q")
        wanted = listed(sorted(map(str, self.kinds)))
        matched = f"{counted(len(others))} ({counted_kinds(others)})"
        return _error("GC016", f"{what} matches {matched}, but {self.method} takes {wanted} sites", path, hint, fix)

    def outside(self, what: str, others: list[Candidate], path: str) -> GraftError:
        message = f"{what} matches {counted(len(others))}, none of them among the {len(self.pool)} selected so far"
        return _error("GC011", message, path, "each step narrows the selection of the steps before it")

    def no_match(self, p: _Pattern, patterns: list[_Pattern]) -> GraftError:
        message = f"{p.field} {p.shown} matches none of the {counted(len(self.pool))}"
        if self.kinds is not None:
            message += f" that {self.method} can take"
        modules = [c.module for c in self.pool]
        if p.field == "modules":
            hint, fix = suggest(p.branch, p.written, modules)
        else:
            loose = bool(self.matcher.matching(p.branch, modules, Place(path=p.path), anywhere=True))
            hint, fix = ("it must match the whole path: begin it with .*" if loose else None), None
        counts = [f"{q.field} {q.shown}: {counted(len(q.hits))}" for q in patterns if q.field == p.field]
        return _error("GC011", message, p.path, hint=hint, fix=fix, details=counts)


# Helpers


def counted_kinds(candidates: Iterable[Candidate]) -> str:
    """Return the number of candidates of each kind, as text."""
    counts = Counter(str(c.kind) for c in candidates)
    return ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))


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
