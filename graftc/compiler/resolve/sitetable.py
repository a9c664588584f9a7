"""`SiteTable`: all sites of one Program, as candidates for targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

from torch import Tensor, fx, nn

from graftc.compat.modules import parameters_of
from graftc.compiler.resolve.token_embeddings import TokenEmbeddings
from graftc.compiler.roles.findings import Structure, place, reasons
from graftc.compiler.roles.layer_values import attended, value_sites
from graftc.compiler.roles.positions import position_readers
from graftc.passes.core.grouping import grouped
from graftc.passes.core.ir.program import ItemsAbove, Program
from graftc.passes.core.packing.modules import packed_types
from graftc.passes.core.sites.site_slices import slices_of
from graftc.passes.core.sites.sites import (
    AttentionSite,
    EmbeddingSite,
    ExpertsSite,
    LinearSite,
    NormSite,
    ParameterSite,
    Site,
    SiteKey,
    SublayerSite,
    Use,
    ValueSite,
    linear_use,
    with_heads_of,
)
from graftc.passes.core.sites.uses import Experts, Lookup
from graftc.passes.core.sites.views import only_moves
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice
from graftc.records.roles import Finding, Sublayer
from graftc.specs.claims import SiteKind
from graftc.specs.roles import widen
from graftc.specs.target import Candidate


@dataclass(eq=False)
class BlockedSite(Site):
    """A place that a target may select but no method can adapt.

    Attributes:
        reason: the reason why no method can adapt it.
        unused: whether no output needs it.
    """

    reason: str = ""
    unused: bool = False


class SiteTable:
    """All sites of one Program.

    A stored weight that is read as a whole is one candidate, however often it is used. Rows with their own role are
    separate candidates.

    Args:
        program: the captured and canonicalised base.
        store: its tensors.
        structure: the roles found in it.
        modules: the source model's modules by path, to distinguish a wrong name from a module that no output needs.
        token_embeddings: the places where the model looks up tokens.

    Attributes:
        entries: each candidate's sites, one per use of its tensor.
        candidates: the places that targets select from; a candidate's key is its index in `entries`.
        uses: the uses of stored weights, by module and parameter name.
        token_embeddings: the places where the model looks up tokens.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        structure: Structure,
        modules: Mapping[str, nn.Module],
        token_embeddings: Sequence[TokenEmbeddings] = (),
    ) -> None:
        self.program, self.store, self.structure, self.modules = program, store, structure, modules
        self.token_embeddings = token_embeddings
        self.entries: list[list[Site]] = []
        self.candidates: list[Candidate] = []
        self._attributes = {str(n.target): n for n in program.graph.find_nodes(op="get_attr")}
        self._same: dict[tuple[SiteKey, WeightSlice], list[Site]] = {}
        self._by_node = grouped(structure.findings, lambda finding: finding.node)
        readers = position_readers(program.graph, structure.findings)
        self._positions = ItemsAbove(program.graph, {positions.reader: positions for positions in readers})
        self.uses = grouped(filter(None, map(linear_use, program.graph.nodes)), self._owner)
        for module, name in self.uses:
            self._weight(module, name)
        read = {use.node for uses in self.uses.values() for use in uses}
        for finding in structure.findings:
            if finding.kind == SiteKind.ATTENTION:
                self._attention(finding)
            elif finding.kind == SiteKind.PARAMETER:
                self._parameter(finding)
            elif finding.kind in _MAPS and finding.node not in read:
                self._blocked(finding)
        self._norms()
        self._sublayers()
        self._other_modules()
        self._other_parameters()
        for sites in value_sites(program.graph, structure, _end):
            self._add(sites)
        self._token_embeddings(token_embeddings)

    # --- weights ---------------------------------------------------------------------------------------

    def _owner(self, use: Use) -> tuple[str, str]:
        """Return a tensor's module and parameter name: the name in the calling module or, failing that, the first name.

        A module that is registered under several paths is identified by the first.
        """
        calling = str(use.node.meta["module"])
        names = [use.weight.tensor, *self.store.tied(use.weight.tensor)]
        chosen = next((n for n in names if n.rpartition(".")[0] == calling), names[0])
        owner = self.modules.get(chosen.rpartition(".")[0])
        same = (n for n in names if owner is not None and self.modules.get(n.rpartition(".")[0]) is owner)
        module, _, name = next(same, chosen).rpartition(".")
        return module, name

    def _weight(self, module: str, name: str) -> None:
        """Add sites for the whole weight, if a use reads all of it, and for the rows with a role of their own."""
        uses = self.uses[module, name]
        spans: dict[WeightSlice, list[Finding]] = {}
        whole = uses[0].weight.at(None)
        if any(use.weight.whole for use in uses):
            spans[whole] = []
        for finding in (f for use in uses for f in self._by_node.get(use.node, ())):
            spans.setdefault(whole.at(finding.rows), []).append(finding)
        for use in uses:  # rows without a role that no whole weight covers are selected by name
            if whole not in spans and not any(own.overlaps(use.weight) for own in spans):
                spans.setdefault(use.weight, [])
        parts: set[str] = set()
        for own, owners in spans.items():
            word = owners[0].role.rpartition(".")[2] if owners else "rows"
            words = chain([word], (f"{word}{number}" for number in count(2)))
            part = "" if own.whole else next(free for free in words if free not in parts)
            parts.add(part)
            if sites := self.linear_sites(SiteKey(module, name, part), own, owners):
                self._add(sites, part=not own.whole and whole in spans)

    def linear_sites(
        self, key: SiteKey, own: WeightSlice, findings: Sequence[Finding] = (), like: Site | None = None
    ) -> list[Site]:
        """Return the sites for some rows of a weight, one per use that reads all of these rows.

        A use whose layout differs from that of the first has different rows and counts as another reader.
        """
        every = self.uses.get((key.module, key.name), [])
        uses = [u for u in every if u.weight.layout is every[0].weight.layout and u.weight.covers(own)]
        if like is not None:
            roles, layer, stack = like.roles, like.layer, like.stack
        else:
            roles = tuple(dict.fromkeys(f.role for f in findings))
            layer, stack = (findings[0].layer, findings[0].stack) if findings else place(key.module)
        return [site_of(use, replace(key, use=index), own, roles, layer, stack) for index, use in enumerate(uses)]

    def readers(self, site: LinearSite) -> list[Site]:
        """Return a site for every use in this Program, in any module, that reads the rows of another Program's site.

        A change to the tensor itself affects all of them.
        """
        uses = self._uses_of(site.own.tensor)
        alike = [use for use in uses if use.weight.layout is site.use.weight.layout and use.weight.covers(site.own)]
        where = site.roles, site.layer, site.stack
        return [site_of(use, replace(site.key, use=at), site.own, *where) for at, use in enumerate(alike)]

    def _uses_of(self, tensor: str) -> list[Use]:
        return [use for uses in self.uses.values() for use in uses if use.weight.tensor == tensor]

    def reads(self, tensor: str) -> bool:
        """Return whether the Program reads a tensor of the Store."""
        return tensor in self._attributes

    def read_elsewhere(self, sites: Sequence[LinearSite]) -> str | None:
        """Return another reader of the rows that these sites of one weight adapt; None if there is none.

        Folding into the weight would also change that reader's result.
        """
        own = sites[0].own
        apart = {use.node for use in self._uses_of(own.tensor) if not use.weight.overlaps(own)}
        known = apart | {site.use.node for site in sites}
        reader = next((node for node in _readers(self._attributes.get(own.tensor)) if node not in known), None)
        return None if reader is None else f"{reader.name} in {reader.meta['module'] or 'the model'}"

    # --- other sites -----------------------------------------------------------------------------------

    def _attention(self, finding: Finding) -> None:
        key = SiteKey(finding.module, finding.role, use=finding.use)
        heads = self.structure.heads.get(finding.node)
        self._add(
            [
                AttentionSite(
                    key,
                    *_where(finding),
                    kind=SiteKind.ATTENTION,
                    node=finding.node,
                    keys=heads.keys if heads is not None else None,
                    values=heads.values if heads is not None else None,
                    operands=heads.operands if heads is not None else None,
                    positions=self._positions.of(finding.node),
                    read=attended(finding.node, self.structure.sublayers),
                )
            ]
        )

    def _parameter(self, finding: Finding) -> None:
        assert finding.parameter is not None
        module, _, name = finding.parameter.rpartition(".")
        key = SiteKey(module, name)
        self._add([ParameterSite(key, *_where(finding), kind=SiteKind.PARAMETER, tensor=finding.parameter)])

    def _other_parameters(self) -> None:
        """Add the base parameters that the Program reads and that belong to no other site."""
        known = {own.tensor for sites in self.entries for site in sites for own in slices_of(site, self.store)}
        for name, _ in self.store.weights():
            if not self.store.is_buffer(name) and name in self._attributes and name not in known:
                self._add([parameter_site(name)])

    def _norms(self) -> None:
        norms = (f for f in self.structure.findings if f.kind == SiteKind.NORM and f.parameter is not None)
        for tensor, findings in grouped(norms, lambda finding: str(finding.parameter)).items():
            module, _, name = tensor.rpartition(".")
            bias = f"{module}.bias".lstrip(".")
            shift = bias if bias != tensor and bias in self._attributes else None
            self._add(
                [
                    NormSite(
                        SiteKey(module, name, use=index),
                        *_where(finding),
                        kind=SiteKind.NORM,
                        node=finding.node,
                        weight=tensor,
                        bias=shift,
                    )
                    for index, finding in enumerate(findings)
                ]
            )

    def _sublayers(self) -> None:
        """Add the sites of sublayers.

        Sublayers that end in the same weight are uses of one place; further sublayers with the same roles in a layer
        are numbered.
        """
        by_role: dict[tuple[str, str], dict[Any, list[Site]]] = defaultdict(dict)
        for sublayer in self.structure.sublayers:
            if not sublayer.roles:
                continue
            role, last = " ".join(sublayer.roles), _last_map(sublayer.projection)
            known = by_role[sublayer.owner, role]
            end = _end(sublayer)
            sites = known.setdefault(end, [])
            number = list(known).index(end) + 1
            key = SiteKey(sublayer.owner, role, str(number) if number > 1 else "", len(sites))
            sites.append(
                SublayerSite(
                    key,
                    sublayer.roles,
                    sublayer.layer,
                    sublayer.stack,
                    kind=SiteKind.SUBLAYER,
                    stream=sublayer.stream,
                    normed=sublayer.normed,
                    inner=last.input if last is not None else None,
                    projection=sublayer.projection,
                    branch=sublayer.branch,
                    sum=sublayer.sum,
                    post_norm=sublayer.post_norm,
                    output=sublayer.output,
                )
            )
        for sites in (sites for known in by_role.values() for sites in known.values()):
            self._add(sites)

    def _token_embeddings(self, embeddings: Sequence[TokenEmbeddings]) -> None:
        """Add a site for each sequence's token embeddings.

        Without a prefix, the role selects those of the first sequence, which is the encoder's if there are two.
        """
        for own in embeddings:
            key = SiteKey(own.module, own.role)
            named = {own.role} if own.role.startswith("decoder.") else None
            self._add([ValueSite(key, (own.role,), None, "", kind=SiteKind.VALUE, node=own.node)], named=named)

    def _blocked(self, finding: Finding) -> None:
        name = (finding.parameter or finding.role).rpartition(".")[2]
        reason = "has a weight that is not just rows of one stored tensor, in order"
        site = BlockedSite(SiteKey(finding.module, name), *_where(finding), kind=finding.kind, reason=reason)
        self._add([site])

    def _other_modules(self) -> None:
        """Add weights without a site as blocked candidates, so that selecting one shows the reason."""
        present = {candidate.module for candidate in self.candidates}
        for path, module in self.modules.items():
            weight = packed_types(module).get("weight", parameters_of(module).get("weight"))
            if weight is None or len(weight.shape) < 2 or path in present:
                continue
            unused = self.store.canonical(f"{path}.weight") not in self._attributes
            reason = (
                "is not needed for any output of the model, so it would never learn"
                if unused
                else "has a weight that no linear map reads, or that is not read as just rows of the stored tensor"
            )
            key = SiteKey(path, "weight")
            self._add([BlockedSite(key, (), *place(path), kind=SiteKind.LINEAR, reason=reason, unused=unused)])

    def _add(self, sites: Sequence[Site], part: bool = False, named: Iterable[str] | None = None) -> None:
        first = sites[0]
        roles = (r for site in sites for role in site.roles for r in widen(role)) if named is None else named
        label = first.key.module + (f"[{first.key.part}]" if first.key.part else "")
        index = len(self.entries)
        self.entries.append(list(sites))
        parameter = first.key.name if first.kind is SiteKind.EXPERTS else ""
        self.candidates.append(
            Candidate(
                index, first.key.module, frozenset(roles), first.kind, first.layer, first.stack, label, part, parameter
            )
        )

    def missing(self, spot: tuple[str, int] | None) -> list[str]:
        """Return the parts without a role, with reasons, of a layer (given by stack and index) or the whole model."""
        return reasons(self.structure.unresolved, spot)

    def same(self, site: Site) -> list[Site]:
        """Return this Program's sites at the place of another Program's site; empty if this one does not read it."""
        if isinstance(site, LinearSite):
            # Adaptations that stack on a place share its sites, which record all insertions so far.
            spot = site.key.place, site.own
            if spot not in self._same:
                self._same[spot] = self.linear_sites(*spot, like=site)
            return self._same[spot]
        key, shared = site.key, isinstance(site, SublayerSite | ValueSite)
        alike = (s for sites in self.entries for s in sites if type(s) is type(site))
        matching = [s for s in alike if (s.key.place == key.place if shared else s.key == key)]
        if isinstance(site, AttentionSite):
            return [with_heads_of(own, site) for own in matching if isinstance(own, AttentionSite)]
        return matching


def parameter_site(tensor: str) -> ParameterSite:
    """Return a site for a whole stored tensor, without a role."""
    module, _, name = tensor.rpartition(".")
    return ParameterSite(SiteKey(module, name), (), *place(module), kind=SiteKind.PARAMETER, tensor=tensor)


def site_of(
    use: Use, key: SiteKey, own: WeightSlice, roles: tuple[str, ...] = (), layer: int | None = None, stack: str = ""
) -> LinearSite:
    """Return a site, of the class that matches a use, for some rows of the use's weight."""
    cls, kind = LinearSite, SiteKind.LINEAR
    if isinstance(use, Experts):
        cls, kind = ExpertsSite, SiteKind.EXPERTS
    elif isinstance(use, Lookup):
        cls, kind = EmbeddingSite, SiteKind.EMBEDDING
    return cls(key, roles, layer, stack, kind=kind, use=use, own=use.weight.at(own.rows))


def _end(sublayer: Sublayer) -> str | fx.Node:
    """Return the weight that a branch ends in, or its sum if several paths meet; all runs of one sublayer share it."""
    last = _last_map(sublayer.projection)
    return last.weight.tensor if last is not None else sublayer.sum


def _last_map(projection: fx.Node) -> Use | None:
    """Return the linear map that a branch ends in; None if several paths meet after it."""
    node = projection
    while (use := linear_use(node)) is None:
        sources = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor)]
        if len(sources) != 1:
            return None
        node = sources[0]
    return use


_MAPS = (SiteKind.LINEAR, SiteKind.EXPERTS, SiteKind.EMBEDDING)


def _where(finding: Finding) -> tuple[tuple[str, ...], int | None, str]:
    return (finding.role,), finding.layer, finding.stack


def _readers(node: fx.Node | None) -> Iterator[fx.Node]:
    """Yield the nodes that read a stored tensor, directly or through views of it."""
    for user in node.users if node is not None else ():
        if only_moves(user) and user.args[0] is node:
            yield from _readers(user)
        else:
            yield user
