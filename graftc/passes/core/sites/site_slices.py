"""The slices of stored tensors that belong to a site."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from graftc.passes.core.sites.sites import LinearSite, NormSite, ParameterSite, Site
from graftc.passes.core.weights.store import Store
from graftc.passes.core.weights.weight_slice import WeightSlice


def slices_of(site: Site, store: Store | Mapping[str, Tensor], *, biases: bool = True) -> tuple[WeightSlice, ...]:
    """Return the slices of stored tensors that belong to a site.

    Args:
        site: a map, a norm or a parameter.
        store: the tensors by Store name.
        biases: whether to include a map's bias.
    """
    if isinstance(site, LinearSite):
        return site.slices if biases else (site.own,)
    names: tuple[str | None, ...] = ()
    if isinstance(site, NormSite):
        names = site.weight, site.bias
    elif isinstance(site, ParameterSite):
        names = (site.tensor,)
    tensors = ((name, store.get(name)) for name in names if name is not None)
    return tuple(WeightSlice.every(name, tensor) for name, tensor in tensors if tensor is not None)
