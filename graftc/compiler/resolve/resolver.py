"""Resolve a spec's targets to the sites of one Program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal

from graftc.compiler.resolve.conflicts import require_no_conflict
from graftc.compiler.resolve.select import check_overrides, select
from graftc.compiler.resolve.sitetable import BlockedSite, SiteTable
from graftc.passes.core.grouping import grouped
from graftc.passes.core.ir.functions import calls, is_within, renamed
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program import Program
from graftc.passes.core.method.registry import method_for
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey, SublayerSite, ValueSite
from graftc.passes.core.weights.tensor_edits import CHANGING, TensorEdits
from graftc.specs.base import MethodSpec
from graftc.specs.document import Spec
from graftc.specs.errors.diagnostics import GraftError, Place, warn
from graftc.specs.regexes import RegexMatcher
from graftc.specs.target import depths


@dataclass(frozen=True)
class Resolved:
    """One adaptation with its sites in one Program.

    Attributes:
        spec: the adaptation.
        sites: every use of every place, each with the spec that applies there.
        shared: places that cannot fold because their tensor has another reader, with a description of that reader.
    """

    spec: MethodSpec
    sites: tuple[tuple[Site, MethodSpec], ...]
    shared: Mapping[SiteKey, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The adaptation's name."""
        assert self.spec.name is not None
        return self.spec.name

    @property
    def places(self) -> tuple[tuple[Site, MethodSpec], ...]:
        """The first use of every place, which determines tensors, folds and counts."""
        first_uses: dict[SiteKey, tuple[Site, MethodSpec]] = {}
        for site, spec in self.sites:
            first_uses.setdefault(place_of(site), (site, spec))
        return tuple(first_uses.values())


def place_of(site: Site) -> SiteKey:
    """Return the key of the place that a site belongs to.

    All uses of one weight form one place, as do sublayers that end in the same weight and the values of a layer that
    runs several times. Every use of anything else is a separate place.
    """
    return site.key.place if isinstance(site, LinearSite | SublayerSite | ValueSite) else site.key


class Resolver:
    """Resolves specs to the sites of one Program.

    Args:
        table: the Program's sites.
    """

    def __init__(self, table: SiteTable) -> None:
        self.table = table

    def resolve(self, spec: Spec) -> list[Resolved]:
        """Return every adaptation with its sites.

        Raises:
            GraftError: GC011 to GC017 for targets, GC021 for rows that partly overlap, GC023 for sites that no output
                needs.
        """
        resolved: list[Resolved] = []
        matcher = RegexMatcher()
        for index, adaptation in enumerate(spec.adapt):
            try:
                resolved.append(self._one(adaptation, f"adapt[{index}]", matcher))
            except GraftError as error:
                raise spec.locate(error) from error
        require_no_conflict(spec, [(own.name, [site for site, _ in own.places]) for own in resolved])
        self._warn(spec, resolved)
        return resolved

    def _one(self, adaptation: MethodSpec, where: str, matcher: RegexMatcher) -> Resolved:
        chosen = select(
            adaptation.target,
            self.table.candidates,
            f"{where}.target",
            kinds=adaptation.claims.sites,
            method=adaptation.method,
            missing=self.table.missing,
            matcher=matcher,
        )
        stack_depths = depths(self.table.candidates)
        check_overrides(adaptation, chosen, where, depth=stack_depths)
        method = method_for(adaptation.method)
        sites: list[tuple[Site, MethodSpec]] = []
        for candidate in chosen:
            assert isinstance(candidate.key, int)
            entry = self.table.entries[candidate.key]
            own = adaptation.for_site(
                candidate.module,
                candidate.roles,
                candidate.layer,
                depth=stack_depths.get(candidate.stack),
                parameter=candidate.parameter,
            )
            if not method.applies(own, entry[0]):
                continue
            if isinstance(entry[0], BlockedSite):
                raise _blocked(entry[0], f"{where}.target")
            sites += [(site, own) for site in entry]
        if not sites:
            message = f"none of the {len(chosen)} places has anything that {adaptation.method} trains"
            raise GraftError("GC014", message, place=Place(path=f"{where}.target"), hint=method.remedy(adaptation))
        return self._resolved(adaptation, sites)

    def _resolved(self, adaptation: MethodSpec, sites: Sequence[tuple[Site, MethodSpec]]) -> Resolved:
        groups = grouped((site for site, _ in sites if isinstance(site, LinearSite)), place_of)
        shared = {key: reason for key, group in groups.items() if (reason := self._shared(group))}
        return Resolved(adaptation, tuple(sites), shared)

    def _shared(self, sites: Sequence[LinearSite]) -> str | None:
        """Return a description of another, unadapted reader of a place's tensor; None if there is no such reader."""
        reader = self.table.read_elsewhere(sites)
        if reader is None:
            return None
        others = self._tied(sites[0])
        return f"is tied to {', '.join(others)}" if others else f"is also read by {reader}"

    def _tied(self, site: LinearSite) -> list[str]:
        """Return the other names of a site's tensor."""
        names = (site.own.tensor, *self.table.store.tied(site.own.tensor))
        return [name for name in names if name != _name_of(site)]

    def _is_copied(self, site: Site) -> bool:
        """Return whether a site's tensor is tied to the tensors at the same place of other layers, and to no others."""
        if not isinstance(site, LinearSite):
            return False
        others = self._tied(site)
        own = _place_in_layer(_name_of(site))
        return bool(others) and own is not None and all(_place_in_layer(other) == own for other in others)

    def again(
        self, main: Iterable[Resolved], *, required: Required = "all", edits: TensorEdits | None = None
    ) -> list[Resolved]:
        """Return another Program's adaptations with their sites in this one.

        Args:
            main: the adaptations as resolved in the other Program.
            required: which places must exist here; other missing places are left out.
            edits: how the other Program's adaptations change stored tensors; in a Program for part of a model, another
                module may read a changed tensor.

        Raises:
            GraftError: GC031, naming an adaptation and a place that this Program does not read.
        """
        result: list[Resolved] = []
        for resolved in main:
            sites: list[tuple[Site, MethodSpec]] = []
            for site, spec in resolved.places:
                matching = self.table.same(site)
                if not matching and edits is not None and isinstance(site, LinearSite):
                    changed = edits.at(site.own.tensor, CHANGING)
                    matching = self.table.readers(site) if any(e.owner == resolved.name for e in changed) else []
                if not matching and (required == "all" or (required == "called" and self._is_called(site))):
                    raise not_read(self.table.program, str(site.key), resolved.name)
                sites += [(other, spec) for other in matching]
            result.append(self._resolved(resolved.spec, sites))
        return result

    def _is_called(self, site: Site) -> bool:
        """Return whether the Program reads a linear site's tensor or, for other sites, runs the site's module."""
        return self.table.reads(site.own.tensor) if isinstance(site, LinearSite) else site.key.module in self._called

    @cached_property
    def _called(self) -> frozenset[str]:
        """The paths of all modules that have nodes in the Program, and of all modules that contain these."""
        graph = self.table.program.graph
        owners = {str(node.meta.get("module", "")) for node in graph.nodes if node.op == "call_function"}
        in_calls = {
            renamed(owner, one.body, one.path) for one in calls(graph) for owner in owners if is_within(owner, one.body)
        }
        return frozenset(path for owner in owners | in_calls for path in accumulate(owner.split("."), "{}.{}".format))

    def _warn(self, spec: Spec, all_resolved: Sequence[Resolved]) -> None:
        for index, resolved in enumerate(all_resolved):
            if method_for(resolved.spec.method).stands_in:
                continue
            place = spec.place(f"adapt[{index}].target")
            copies_named = False
            for site, _ in resolved.places:
                if (reader := resolved.shared.get(place_of(site))) is None:
                    continue
                message = f"{site.key} {reader}: {resolved.name!r} trains it but will not fold"
                hint = "exclude it, or deploy with the adaptation in the graph"
                if self._is_copied(site):
                    if copies_named:  # all weights of a copied layer are shared, so one of them is named
                        continue
                    copies_named = True
                    message = f"copies of layers share {site.key}: {resolved.name!r} trains beside it but will not fold"
                    hint = "untie the copies, or deploy with the adaptation in the graph"
                warn("GC024", message, place=place, hint=hint)


Required = Literal["all", "called", "none"]
"""The adapted places that another Program must contain: all, only those in modules that it calls, or none."""


def not_read(program: Program, place: str, owner: str) -> GraftError:
    """Return the error for a Program that does not read an adapted place."""
    return GraftError(
        "GC031",
        f"with the inputs {', '.join(program.signature)} the model does not read {place}, which {owner!r} adapts",
        hint="leave that place out of the spec, or call the model with the inputs it was compiled with",
    )


def _name_of(site: LinearSite) -> str:
    return f"{site.key.module}.{site.key.name}"


def _place_in_layer(name: str) -> tuple[str, str] | None:
    """Return the path of the stack that a tensor belongs to, and its name in its layer; None outside of layers."""
    layer = layer_path(name)
    return (layer.rpartition(".")[0], name.removeprefix(layer)) if layer else None


def _blocked(site: BlockedSite, path: str) -> GraftError:
    other = "exclude it, use a model head that reads it, or give example inputs that call it"
    code, hint = ("GC023", other) if site.unused else ("GC017", "leave it out with exclude")
    return GraftError(code, f"{site.key.module} {site.reason}", place=Place(path=path), hint=hint)
