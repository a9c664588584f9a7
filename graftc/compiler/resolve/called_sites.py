"""`CalledSites`: all sites of a Program whose layers call functions, both in the bodies and at the calls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import groupby

from torch import fx, nn

from graftc.compiler.resolve.moved import SiteMove
from graftc.compiler.resolve.sitetable import SiteTable
from graftc.compiler.resolve.token_embeddings import TokenEmbeddings
from graftc.compiler.roles.findings import Structure, place
from graftc.passes.core.ir.functions import FunctionCall, UnlikeBodyError, calls, cut, renamed
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program import Program
from graftc.passes.core.sites.sites import LinearSite, Site, ValueSite
from graftc.passes.core.weights.store import Store
from graftc.specs.target import Candidate


class CalledSites(SiteTable):
    """All sites of a Program with calls.

    Layer sites are detected in a graph from which the called layers have been cut out. A site at a call refers to the
    nodes of the body, except for the layer's inputs and outputs, for which every call has its own nodes.

    Args:
        program, store, modules, token_embeddings: as for `SiteTable`.
        structure: the roles found in the Program without its calls.
    """

    def __init__(
        self,
        program: Program,
        store: Store,
        structure: Structure,
        modules: Mapping[str, nn.Module],
        token_embeddings: Sequence[TokenEmbeddings] = (),
    ) -> None:
        self._calls = calls(program.graph)
        self._call_of = {one.path: one for one in self._calls}
        self._bodies = {one.body for one in self._calls}
        outside = {path: module for path, module in modules.items() if self.call_of(path) is None}
        with cut(program.graph) as instead:
            super().__init__(program, store, structure, outside, token_embeddings)
        self.modules = modules
        self._moves = {one.path: SiteMove(one.body, one.path, {}) for one in self._calls}
        self._edges = {one.path: SiteMove(one.body, one.path, _edges(one)) for one in self._calls}
        for module, nodes in instead.items():
            self._read_calls(layer_path(module), SiteMove("", "", nodes))
        self._repeat()

    def call_of(self, module: str) -> FunctionCall | None:
        """Return the call that a module belongs to; None if the module is written out."""
        return self._call_of.get(layer_path(module))

    def _read_calls(self, layer: str, move: SiteMove) -> None:
        """Make the sites of a layer that follows calls refer to the values that the layer reads from these calls."""
        for entry in self.entries:
            if layer and layer_path(entry[0].key.module) == layer:
                entry[:] = [move.site(site) for site in entry]

    def _repeat(self) -> None:
        """Insert each call's sites after those of its body, in layer order."""
        pairs = [*zip(self.candidates, self.entries, strict=True)]
        self.entries, self.candidates = [], []
        for in_body, group in groupby(pairs, key=lambda pair: layer_path(pair[0].module) in self._bodies):
            run = list(group)
            for candidate, sites in run:
                self._append(sites, candidate)
            for one in self._calls if in_body else ():
                for candidate, sites in run:
                    if layer_path(candidate.module) == one.body:
                        self._append([self._at(one, site) for site in sites], _moved_candidate(candidate, one))

    def _append(self, sites: list[Site], candidate: Candidate) -> None:
        self.candidates.append(replace(candidate, key=len(self.entries)))
        self.entries.append(sites)

    def _at(self, one: FunctionCall, site: Site) -> Site:
        """Return a body site's counterpart at a call."""
        if not isinstance(site, ValueSite):
            return self._moves[one.path].site(site)
        if site.node not in (*one.given, *one.body_results):
            raise UnlikeBodyError(f"{site.key} is within the body")
        return self._edges[one.path].site(site)

    def reads(self, tensor: str) -> bool:
        """Return whether the Program reads a tensor; a call's tensors are looked up under their names in the body."""
        one = self.call_of(tensor)
        return super().reads(tensor if one is None else renamed(tensor, one.path, one.body))

    def same(self, site: Site) -> list[Site]:
        """Return the sites at the same place as another Program's site; at a call, derive them from the body's."""
        one = self.call_of(site.key.module)
        if one is None or not isinstance(site, LinearSite):
            return super().same(site)
        spot = site.key.place, site.own
        if spot not in self._same:
            body_site = SiteMove(one.path, one.body, {}).site(site)
            body_sites = self.linear_sites(body_site.key.place, body_site.own, like=body_site)
            self._same[spot] = [self._moves[one.path].site(each) for each in body_sites]
        return self._same[spot]

    def readers(self, site: LinearSite) -> list[Site]:
        """Refuse to list the readers of a tensor, since only a graph without calls shows them all.

        Raises:
            UnlikeBodyError: always, because all layers must be written out first.
        """
        raise UnlikeBodyError(f"{site.key} may be read anywhere")

    def read_elsewhere(self, sites: Sequence[LinearSite]) -> str | None:
        """Return another reader of these sites' rows, if any; None at a call, where the body's sites decide.

        Raises:
            UnlikeBodyError: if a body's weight is read outside of its site.
        """
        if self.call_of(sites[0].key.module) is not None:
            return None  # the body's sites decide
        reader = super().read_elsewhere(sites)
        if reader is not None and layer_path(sites[0].key.module) in self._bodies:
            raise UnlikeBodyError(f"{sites[0].key} is read elsewhere")
        return reader


def _edges(one: FunctionCall) -> dict[fx.Node, fx.Node]:
    """Return a map from the inputs and results of the body to those of a call."""
    results = {one.body_results[index]: node for node, index in one.results.items()}
    return {**dict(zip(one.given, one.inputs, strict=True)), **results}


def _moved_candidate(candidate: Candidate, one: FunctionCall) -> Candidate:
    layer, stack = place(one.path)
    module, label = (renamed(text, one.body, one.path) for text in (candidate.module, candidate.label))
    return replace(candidate, module=module, label=label, layer=layer, stack=stack)
