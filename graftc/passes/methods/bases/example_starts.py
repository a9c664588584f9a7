"""Initial factors of LoRA from examples: principal directions of inputs, and singular directions of gradients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.build.tensors import tensor_name
from graftc.passes.core.method.capabilities import Transition
from graftc.passes.core.method.principal import PrincipalComponents
from graftc.passes.core.method.steering import AdaptedSite
from graftc.passes.core.sites.sites import LinearSite, unsupported
from graftc.passes.core.sites.uses import Dense
from graftc.specs.errors.diagnostics import GraftError, Place
from graftc.specs.methods.lora import LoRA, LoRAOverride

FROM_EXAMPLES = ("eva", "lora_ga")
"""Initialisers that read examples."""


_ITERATIONS = 16
"""Iterations of the randomised decomposition of a gradient, whose singular values may be close to each other."""


def check_site(spec: LoRA, site: LinearSite) -> None:
    """Check that a site can start from examples.

    Raises:
        GraftError: GC017 for anything but a dense layer; GC020 if ``lora_ga`` needs more directions than the site has.
    """
    if not isinstance(site.use, Dense) or site.leading:
        raise unsupported(site, f"is not a dense layer, so init: {spec.init} does not apply to it", "use another init")
    limit = min(site.in_features, site.out_features) // 2
    if spec.init == "lora_ga" and spec.rank > limit:
        message = f"init: lora_ga needs twice as many directions as the rank, and {site.key} has {2 * limit}"
        raise GraftError("GC020", message, place=Place(path="rank"), hint=f"use a rank of at most {limit}")


def most_components(place: AdaptedSite[LoRA]) -> int:
    """Return the largest rank that ``eva`` may give a site."""
    site = place.site
    assert isinstance(site, LinearSite)
    return min(round(place.spec.rank * place.spec.eva_rho), site.in_features, site.out_features)


def from_inputs(
    spec: LoRA, places: Sequence[AdaptedSite[LoRA]], statistics: Sequence[PrincipalComponents | Tensor]
) -> Transition[LoRA]:
    """Return a LoRA whose A consists of the principal directions of each site's inputs, and whose B is zero.

    All ranks add up to the same number as before. Each site gets one, and the others go to the directions that explain
    the largest share of their input's variance. The scaling of each site stays the same.
    """
    _require_untrained(spec, places)
    components = [each for each in statistics if isinstance(each, PrincipalComponents)]
    ranks = _distributed(places, components)
    values: dict[str, Tensor] = {}
    for place, own, rank in zip(places, components, ranks, strict=True):
        down = own.directions[:rank]
        if spec.eva_whiten:
            down = down / (own.variances[:rank, None] * max(1, own.seen - 1)).sqrt().sqrt()
        values |= _values(spec, place, down, place.tensors["B"].new_zeros(place.tensors["B"].shape[0], rank))
    overrides = tuple(_override(spec, place, rank, places) for place, rank in zip(places, ranks, strict=True))
    changed = tuple(override for override in overrides if override is not None)
    return Transition(spec.model_copy(update={"init": "kaiming", "overrides": changed}), values)


def _distributed(places: Sequence[AdaptedSite[LoRA]], components: Sequence[PrincipalComponents]) -> list[int]:
    """Return the rank of each place."""
    budget = sum(place.spec.rank for place in places)
    limits = [
        min(most_components(place), own.directions.shape[0]) for place, own in zip(places, components, strict=True)
    ]
    shares = [
        (float(share), -index)
        for index, (own, limit) in enumerate(zip(components, limits, strict=True))
        for share in own.explained[1:limit]
    ]
    chosen = Counter(-index for _, index in sorted(shares, reverse=True)[: budget - len(places)])
    return [1 + chosen[index] for index in range(len(places))]


def _override(
    spec: LoRA, place: AdaptedSite[LoRA], rank: int, places: Sequence[AdaptedSite[LoRA]]
) -> LoRAOverride | None:
    """Return the override for a place whose fields differ from the adaptation's; None if none does."""
    own = place.spec
    # The scaling is alpha over the rank or its root, and stays what it was.
    alpha = own.alpha * ((rank / own.rank) ** 0.5 if own.rslora else rank / own.rank)
    fields: dict[str, Any] = {"rank": rank, "alpha": alpha, "dropout": own.dropout}
    differing = {name: value for name, value in fields.items() if value != getattr(spec, name)}
    if not differing:
        return None
    site = place.site
    several = sum(other.site.key.module == site.key.module for other in places) > 1
    return LoRAOverride(modules=site.key.module, role=site.roles[0] if several and site.roles else None, **differing)


def from_gradients(
    spec: LoRA, places: Sequence[AdaptedSite[LoRA]], statistics: Sequence[PrincipalComponents | Tensor]
) -> Transition[LoRA]:
    """Return the factors of LoRA-GA and copies of them, whose product is subtracted.

    With the gradient's singular vectors ``u`` and ``v`` and ``c = out^(1/4) / sqrt(gamma)``, ``A = c v[:, :r]^T`` and
    ``B = c u[:, r:2r]``, so that the first step of B and A follows the gradient's best approximation of rank ``2r``.
    """
    _require_untrained(spec, places)
    values: dict[str, Tensor] = {}
    for place, gradient in zip(places, statistics, strict=True):
        assert isinstance(gradient, Tensor)
        rank, out = place.spec.rank, gradient.shape[-2]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            u, _, v = torch.svd_lowrank(gradient, q=min(4 * rank, *gradient.shape[-2:]), niter=_ITERATIONS)
        scale = out**0.25 / place.spec.lora_ga_gamma**0.5
        down, up = scale * v[:, :rank].mT, scale * u[:, rank : 2 * rank]
        values |= _values(spec, place, down, up) | _values(spec, place, down, up, "0")
    return Transition(spec, values)


def _require_untrained(spec: LoRA, places: Sequence[AdaptedSite[LoRA]]) -> None:
    """Raise GC056 if the factors have been trained: B is zero until then."""
    if any(bool(place.tensors["B"].any()) for place in places):
        message = f"{str(spec.name)!r} has been trained, and initial values would replace what it has learned"
        raise GraftError("GC056", message, hint="compile the spec again, and initialise the model before it is trained")


def _values(spec: LoRA, place: AdaptedSite[LoRA], down: Tensor, up: Tensor, suffix: str = "") -> dict[str, Tensor]:
    """Return factors by their Store names, in the dtype of the place's own."""
    return {
        tensor_name(place.site, str(spec.name), f"{part}{suffix}"): value.to(place.tensors["A"].dtype).contiguous()
        for part, value in (("A", down), ("B", up))
    }
