"""Parameters that belong to neither a linear map nor a norm: :func:`other_parameters`."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

from graftc.compiler.roles.findings import place
from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site, SiteKey
from graftc.passes.core.weights.store import Store
from graftc.specs.claims import SiteKind


def other_parameters(store: Store, read: Container[str], entries: Sequence[Sequence[Site]]) -> Iterator[ParameterSite]:
    """Yield a site for each whole parameter of the base that no existing site covers.

    Args:
        store: the tensors.
        read: names of the tensors that a graph reads.
        entries: the existing sites.
    """
    known = {name for sites in entries for site in sites for name in _tensors(site)}
    for name, _ in store.weights():
        if not store.is_buffer(name) and name in read and name not in known:
            module, _, last = name.rpartition(".")
            layer, stack = place(module)
            yield ParameterSite(SiteKey(module, last), (), layer, stack, kind=SiteKind.PARAMETER, tensor=name)


def _tensors(site: Site) -> tuple[str | None, ...]:
    if isinstance(site, LinearSite):
        return tuple(own.tensor for own in site.slices)
    if isinstance(site, NormSite):
        return site.weight, site.bias
    return (site.tensor,) if isinstance(site, ParameterSite) else ()
