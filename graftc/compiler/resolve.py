"""From a spec's targets to the sites of one Program, and the conflicts among them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx, nn

from graftc.compiler.select import Candidate, check_overrides, depths, match_modules, select
from graftc.compiler.structure import Finding, Structure
from graftc.passes.core.program import Program
from graftc.passes.core.rows import Rows
from graftc.passes.core.sites import (
    AttentionSite,
    LinearSite,
    LinearUse,
    ParameterSite,
    Site,
    SiteKey,
    linear_use,
)
from graftc.passes.core.store import Store
from graftc.specs.base import MethodSpec
from graftc.specs.claims import SiteKind
from graftc.specs.diagnostics import GraftError, Place, warn
from graftc.specs.document import Spec
from graftc.specs.roles import widen


@dataclass(frozen=True)
class Resolved:
    """One adaptation with its sites in one Program, each with the spec that holds for it."""

    spec: MethodSpec
    sites: tuple[tuple[Site, MethodSpec], ...]

    @property
    def name(self) -> str:
        """The adaptation's name."""
        assert self.spec.name is not None
        return self.spec.name


class SiteTable:
    """All sites of one Program, as candidates for targets.

    Args:
        program: the base as captured, canonicalised.
        store: its tensors.
        structure: the roles found in it.
        modules: the source model's module types by path, to tell a wrong name from a module that no output needs.
    """

    def __init__(self, program: Program, store: Store, structure: Structure, modules: Mapping[str, nn.Module]) -> None:
        self.program, self.store, self.structure, self.modules = program, store, structure, modules
        self.sites: list[Site] = []
        self.candidates: list[Candidate] = []
        by_node: dict[fx.Node, list[Finding]] = defaultdict(list)
        for finding in structure.findings:
            by_node[finding.node].append(finding)
        uses: dict[str, int] = defaultdict(int)
        for node in program.graph.nodes:
            use = linear_use(node)
            if use is not None:
                self._linear(use, by_node.get(node, []), uses)
            for finding in by_node.get(node, ()):
                if finding.kind == SiteKind.ATTENTION:
                    self._attention(finding)
        self._unused()

    def _linear(self, use: LinearUse, findings: Sequence[Finding], uses: dict[str, int]) -> None:
        module = str(use.node.meta["module"])
        index, uses[module] = uses[module], uses[module] + 1
        parameter = use.weight.rpartition(".")[2]
        whole = [f for f in findings if f.rows is None]
        layer, stack = (findings[0].layer, findings[0].stack) if findings else _place(module)
        roles = tuple(f.role for f in whole)
        rows = Rows(use.out_features)
        key = SiteKey(module, parameter, use=index)
        self._add(LinearSite(key, roles, layer, stack, kind=SiteKind.LINEAR, use=use, rows=rows))
        for finding in findings:
            if finding.rows is None:
                continue
            part = finding.role.rpartition(".")[2]
            self._add(
                LinearSite(
                    SiteKey(module, parameter, part, index),
                    (finding.role,),
                    finding.layer,
                    finding.stack,
                    kind=SiteKind.LINEAR,
                    use=use,
                    rows=Rows(use.out_features, finding.rows),
                ),
                part=True,
            )

    def _attention(self, finding: Finding) -> None:
        key = SiteKey(finding.module, finding.role, use=finding.use)
        site = AttentionSite(
            key, (finding.role,), finding.layer, finding.stack, kind=SiteKind.ATTENTION, node=finding.node
        )
        self._add(site)

    def _unused(self) -> None:
        """Linear modules whose result no output needs are candidates too, so that naming one says what is wrong."""
        present = {site.key.module for site in self.sites}
        for path, module in self.modules.items():
            weight = getattr(module, "weight", None)
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            if is_linear and path not in present and isinstance(weight, nn.Parameter) and weight.dim() == 2:
                layer, stack = _place(path)
                key = SiteKey(path, "weight")
                self._add(Site(key, (), layer, stack, kind=SiteKind.LINEAR))

    def _add(self, site: Site, part: bool = False) -> None:
        roles = frozenset(r for role in site.roles for r in widen(role))
        index = len(self.sites)
        self.sites.append(site)
        label = site.key.module + (f"[{site.key.part}]" if site.key.part else "")
        self.candidates.append(Candidate(index, site.key.module, roles, site.kind, site.layer, site.stack, label, part))

    def resolve(self, spec: Spec) -> list[Resolved]:
        """The sites of every adaptation.

        Raises:
            GraftError: GC011 to GC016 for targets, GC021 for rows with two owners, GC023 for sites that no output
                needs.
        """
        found: list[Resolved] = []
        for index, adaptation in enumerate(spec.adapt):
            where = f"adapt[{index}]"
            try:
                found.append(self._one(adaptation, where))
            except GraftError as error:
                raise spec.locate(error) from error
        self._conflicts(spec, found)
        self._tied(found)
        return found

    def _one(self, adaptation: MethodSpec, where: str) -> Resolved:
        chosen = select(
            adaptation.target,
            self.candidates,
            f"{where}.target",
            kinds=adaptation.claims.sites,
            method=adaptation.method,
        )
        stack_depths = depths(self.candidates)
        check_overrides(adaptation, chosen, where, depth=stack_depths)
        sites: list[tuple[Site, MethodSpec]] = []
        for candidate in chosen:
            index = candidate.key
            assert isinstance(index, int)
            site = self.sites[index]
            if type(site) is Site:
                raise GraftError(
                    "GC023",
                    f"{site.key.module} is not needed for any output of the model, so it would never learn",
                    place=Place(path=f"{where}.target"),
                    hint="exclude it, or use a model head that reads it",
                )
            depth = stack_depths.get(candidate.stack)
            own = adaptation.for_site(candidate.module, candidate.roles, candidate.layer, depth=depth)
            sites.append((site, own))
        return Resolved(adaptation, tuple(sites))

    def _conflicts(self, spec: Spec, found: Sequence[Resolved]) -> None:
        """Rows of one linear belong to one adaptation, or to several that name exactly the same rows."""
        owners: dict[tuple[fx.Node, str], list[tuple[Rows, str, int]]] = defaultdict(list)
        for index, resolved in enumerate(found):
            for site, _ in resolved.sites:
                if not isinstance(site, LinearSite):
                    continue
                held = owners[site.use.node, site.use.weight]
                for rows, name, _ in held:
                    same = rows == site.rows and name != resolved.name
                    if rows.overlaps(site.rows) and not same:
                        raise spec.locate(
                            GraftError(
                                "GC021",
                                f"{resolved.name!r} adapts {_rows(site.rows)} of {site.key.module}, "
                                f"{name!r} adapts {_rows(rows)} of it",
                                place=Place(path=f"adapt[{index}].target"),
                                hint="adaptations stack on exactly the same rows; leave one of them out, or name "
                                "the same rows in both",
                            )
                        )
                held.append((site.rows, resolved.name, index))

    def _tied(self, found: Sequence[Resolved]) -> None:
        for resolved in found:
            for site, _ in resolved.sites:
                tied = self.store.tied(site.use.weight) if isinstance(site, LinearSite) else ()
                if isinstance(site, LinearSite) and tied:
                    others = [n for n in (site.use.weight, *tied) if n != f"{site.key.module}.{site.key.name}"]
                    warn(
                        "GC024",
                        f"{site.key} is tied to {', '.join(others)}: {resolved.name!r} trains there but will not fold",
                    )

    def trained(self, spec: Spec) -> list[ParameterSite]:
        """The parameters of the modules that ``train:`` names, as sites.

        Raises:
            GraftError: GC011 for a pattern that matches no module, GC022 for a tied tensor, GC023 for one that no
                output needs.
        """
        if not spec.train:
            return []
        used = {str(n.target) for n in self.program.graph.find_nodes(op="get_attr")}
        sites: dict[str, ParameterSite] = {}
        try:
            for path in match_modules(spec.train, [m for m in self.modules if m]):
                for site in self._parameters(path, used):
                    sites.setdefault(site.tensor, site)
        except GraftError as error:
            raise spec.locate(error) from error
        return list(sites.values())

    def _parameters(self, path: str, used: set[str]) -> list[ParameterSite]:
        found: list[ParameterSite] = []
        place = Place(path="train")
        for name, _ in self.modules[path].named_parameters(path, remove_duplicate=False):
            if self.store.tied(name):
                others = ", ".join(self.store.tied(name))
                raise GraftError(
                    "GC022",
                    f"{path} would train {name}, which is tied to {others}",
                    place=place,
                    hint="training one use of a tied tensor changes the other; break the tie in the model first",
                )
            if name not in used:
                raise GraftError(
                    "GC023",
                    f"{name} is not needed for any output of the model, so it would never learn",
                    place=place,
                    hint="leave its module out of train",
                )
            module, _, last = name.rpartition(".")
            layer, stack = _place(module)
            key = SiteKey(module, last)
            found.append(ParameterSite(key, (), layer, stack, kind=SiteKind.PARAMETER, tensor=name))
        return found


def _rows(rows: Rows) -> str:
    return "all rows" if rows.whole else f"rows {rows}"


def _place(module: str) -> tuple[int | None, str]:
    """Layer and stack from a module path."""
    segments = module.split(".")
    for index, segment in enumerate(segments):
        if segment.isdigit():
            return int(segment), ".".join(segments[:index])
    return None, ""


def site_keys(resolved: Sequence[Resolved]) -> dict[str, list[str]]:
    """Adaptation name to its SiteKeys as text: what every Program of a Compilation must agree on."""
    return {r.name: [str(site.key) for site, _ in r.sites] for r in resolved}
