"""Combine several adaptations into one LoRA, and measure the resulting error at every site."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from graftc.compiler.compilation import Compilation
from graftc.compiler.folding.steps import site_steps
from graftc.compiler.inspect.snapshot import adapter_values
from graftc.compiler.resolve.compose import Unit
from graftc.compiler.resolve.resolver import Resolved
from graftc.passes.core.sites.sites import LinearSite, SiteKey
from graftc.passes.core.weights.folds import FoldStep
from graftc.passes.core.weights.names import owner_of
from graftc.runtime.deploy.low_rank import Decomposition, Factors, distance, lora_of, values_of
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.sharded import in_every_process
from graftc.runtime.model.views import with_every_adaptation
from graftc.specs.claims import SiteKind
from graftc.specs.compose import Bank, Stack
from graftc.specs.document import Spec
from graftc.specs.errors.arguments import kind_of
from graftc.specs.errors.diagnostics import GraftError, unknown_name
from graftc.specs.methods.lora import LoRA
from graftc.specs.target import Target

Kind = Literal["concatenation", "linear", "svd", "ties", "dare"]
KINDS: tuple[Kind, ...] = ("concatenation", "linear", "svd", "ties", "dare")


@dataclass(frozen=True)
class _Way:
    """The options of a combination: see `Combining.combine`."""

    kind: Kind
    rank: int | None
    density: float
    seed: int


@dataclass(frozen=True)
class Combined:
    """One LoRA in place of several adaptations.

    Attributes:
        compiled: the model with the new adaptation instead of the others.
        name: the name of the new adaptation.
        errors: by site, the Frobenius distance of the new update from the exact result of the combination, relative to
            the norm of the latter. It is 0, up to rounding, for a concatenation; for ``linear``, the exact result is
            the weighted sum of the updates.
    """

    compiled: Any
    name: str
    errors: Mapping[str, float]

    @property
    def largest_error(self) -> float:
        """The error at the worst site; 0 if there are no sites."""
        return max(self.errors.values(), default=0.0)


class Combining:
    """The operation that combines several adaptations into one.

    Args:
        runner: the Runner of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    @in_every_process
    @with_every_adaptation
    def combine(
        self,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        kind: Kind = "svd",
        name: str = "combined",
        rank: int | None = None,
        density: float = 0.5,
        seed: int = 0,
    ) -> Combined:
        """Combine adaptations into one LoRA, and measure the error; this model stays unchanged.

        Where only some of the adaptations apply, the updates of the others count as zero.

        Args:
            names: names of the adaptations.
            weights: the weight of each adaptation's update; 1 by default.
            kind: ``"concatenation"`` puts factors side by side, which is exact and adds up ranks; ``"linear"`` adds the
                factors, which is cheap but is not the sum of the updates; ``"svd"`` uses the nearest update of a given
                rank; ``"ties"`` and ``"dare"`` sparsify the updates first (Yadav et al. 2023, TIES-Merging; Yu et al.
                2024, Language Models are Super Mario). The last three accept every method that folds into the weight
                alone.
            name: the name of the new adaptation.
            rank: the rank for ``"svd"``, ``"ties"`` and ``"dare"``; by default the largest of the adaptations' ranks.
            density: the fraction of entries that ``"ties"`` and ``"dare"`` keep.
            seed: the random seed for ``"dare"``.

        Raises:
            GraftError: GC002 for invalid arguments, GC029 for adaptations that cannot be combined in this way,
                GC091 for unknown names.
        """
        compilation = self.runner.compilation
        chosen = _chosen(compilation, names)
        factors = [1.0] * len(names) if weights is None else list(weights)
        if kind not in KINDS or len(factors) != len(names) or not 0 < density <= 1 or (rank is not None and rank < 1):
            raise GraftError(
                "GC002",
                "combining needs a known kind, one weight per adaptation, a density in (0, 1] and a rank of at least 1",
                hint=f"the kinds are: {', '.join(KINDS)}",
            )
        way = _Way(kind, rank, density, seed)
        new_factors: dict[SiteKey, Factors] = {}
        errors: dict[str, float] = {}
        sites = _sites(chosen)
        for site in sites:
            new_factors[site.key], errors[str(site.key)] = _at(compilation, chosen, factors, site, way)
        values = {n: t for n, t in adapter_values(compilation.store) if owner_of(n) not in names}
        values |= values_of(name, new_factors, sites)
        new = lora_of(name, _target(chosen, sites), new_factors, sites)
        spec = _spec(compilation.spec, chosen[0], names, new)
        result = self.runner.sibling(spec, values)
        result.train(self.runner.training)
        return Combined(result, name, errors)


def _chosen(compilation: Compilation, names: Sequence[str]) -> list[Resolved]:
    """Return the adaptations with these names, after checking that they can be combined."""
    known = {r.name: r for r in compilation.main.resolved}
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise GraftError("GC073", f"names must be a list of strings, got {kind_of(names)}", hint="pass a list of names")
    for name in names:
        if name not in known:
            raise unknown_name("adaptation", name, known)
    chosen = [known[name] for name in names]
    if len(set(names)) < max(2, len(names)):
        raise GraftError("GC002", "combining needs two or more different adaptations")
    _check_compositions(compilation.spec, names)
    return chosen


def _sites(chosen: Sequence[Resolved]) -> list[LinearSite]:
    """Return every linear site of the adaptations, each once."""
    sites: dict[SiteKey, LinearSite] = {}
    for item in chosen:
        sites |= {s.key: s for s, _ in item.places if isinstance(s, LinearSite) and s.key not in sites}
    return list(sites.values())


def _target(chosen: Sequence[Resolved], sites: Sequence[LinearSite]) -> Target:
    """Return a target for all places: the adaptations' own if all have the same places, otherwise their modules.

    Raises:
        GraftError: GC029 for a part of a fused weight's rows, which no list of modules can name.
    """
    places = [{site.key for site, _ in item.places} for item in chosen]
    for item, keys in zip(chosen, places, strict=True):
        if keys != places[0] and (parts := [site.key for site in sites if site.key.part or site.key.use]):
            message = f"{item.name!r} and {chosen[0].name!r} adapt different places, and {parts[0]} is part of a weight"
            raise GraftError(
                "GC029", message, hint="combine adaptations that have the same target, or that adapt whole modules"
            )
    if all(keys == places[0] for keys in places):
        return chosen[0].spec.target
    several = {SiteKind.EXPERTS}
    names = [f"{s.key.module}.{s.key.name}" if s.kind in several else s.key.module for s in sites]
    return Target(modules=tuple(names), expect=len(sites))


def _is_at(item: Resolved, site: LinearSite) -> bool:
    return any(other.key == site.key for other, _ in item.places)


def _at(
    compilation: Compilation,
    chosen: Sequence[Resolved],
    weights: Sequence[float],
    site: LinearSite,
    way: _Way,
) -> tuple[Factors, float]:
    """Return the new LoRA's factors at one site, in float64 and for a scaling of 1, and its error at that site."""
    present = [number for number, item in enumerate(chosen) if _is_at(item, site)]
    if way.kind in ("concatenation", "linear"):
        adapting, factors = [chosen[number] for number in present], [weights[number] for number in present]
        return _of_factors(compilation, adapting, factors, site, way.kind)
    updates = [_update(compilation, item, site) for item in chosen]
    scaled = torch.stack([weight * update for weight, update in zip(weights, updates, strict=True)])
    if way.kind == "ties":
        wanted = _ties(scaled, way.density)
    elif way.kind == "dare":
        wanted = _dare(scaled, way.density, way.seed, str(site.key))
    else:
        wanted = scaled.sum(0)
    limit = min(wanted.shape[-2:])
    largest = max(_rank(chosen[number], site, limit) for number in present)
    truncated = Decomposition(wanted).factors(min(way.rank or largest, limit))
    return truncated, distance(truncated.update, wanted)


def _update(compilation: Compilation, item: Resolved, site: LinearSite) -> Tensor:
    """Return the update that an adaptation's own fold adds to a site's weight; zeros if it does not adapt the site."""
    if not _is_at(item, site):
        own = site.own.operand(compilation.store.full(site.own.tensor).double())
        return torch.zeros_like(own)
    step = _step(compilation, item, site)
    store, bias = compilation.store, step.bias
    own = step.weight.operand(store.full(step.weight.tensor).double())
    before = None if bias is None or bias.tensor not in store else bias.take(store.full(bias.tensor).double())
    weight, after = step.apply(own, before)
    if after is not None and (before is None or not torch.equal(after, before)):
        raise GraftError("GC029", f"{item.name!r} changes the bias of {site.key}, which a LoRA cannot")
    return weight - own


def _step(compilation: Compilation, item: Resolved, site: LinearSite) -> FoldStep:
    own = site_steps(compilation, Unit(None, (item,), 0))
    steps = [s for s in own if s.site == str(site.key)]
    if len(steps) != 1:
        raise GraftError("GC029", f"{item.name!r} does not fold into the weight alone at {site.key}")
    return steps[0]


def _rank(item: Resolved, site: LinearSite, limit: int) -> int:
    spec = next(spec for other, spec in item.places if other.key == site.key)
    return int(getattr(spec, "rank", limit))


def _of_factors(
    compilation: Compilation, chosen: Sequence[Resolved], weights: Sequence[float], site: LinearSite, kind: Kind
) -> tuple[Factors, float]:
    """Combine the factors themselves, side by side or added up, and return the result and its error."""
    downs, ups, total = [], [], None
    for item, weight in zip(chosen, weights, strict=True):
        spec = next(spec for other, spec in item.places if other.key == site.key)
        parts = compilation.parts[item.name].get(site.key, {})
        if not isinstance(spec, LoRA) or "A0" in parts:
            hint = "svd, ties and dare accept every method that folds"
            raise GraftError("GC029", f"{item.name!r} has no plain factors for a {kind} combination", hint=hint)
        a, b = (compilation.store.full(parts[part]).double() for part in ("A", "B"))
        scale = weight * spec.scaling
        total = scale * b @ a if total is None else total + scale * b @ a
        # Each factor is multiplied by the square root of the scale, and one of them also by the scale's sign.
        root = math.sqrt(abs(scale))
        downs.append(root * a)
        ups.append(math.copysign(root, scale) * b)
    assert total is not None
    if kind == "concatenation":
        return Factors(torch.cat(downs, -2), torch.cat(ups, -1)), 0.0
    if len({a.shape for a in downs}) > 1:
        raise GraftError("GC029", f"a linear combination needs equal ranks at {site.key}", hint="use concatenation")
    added = Factors(torch.stack(downs).sum(0), torch.stack(ups).sum(0))
    return added, distance(added.update, total)


def _ties(updates: Tensor, density: float) -> Tensor:
    """Keep each update's largest entries, elect signs by mass, and average those that agree (Yadav et al. 2023)."""
    kept = torch.stack([_largest(update, density) for update in updates])
    sign = kept.sum(0).sign()
    agree = (kept.sign() == sign) & (kept != 0)
    return (kept * agree).sum(0) / agree.sum(0).clamp_min(1)


def _largest(update: Tensor, density: float) -> Tensor:
    count = max(1, math.ceil(density * update.numel()))
    index = update.abs().flatten().topk(count).indices
    return torch.zeros_like(update).flatten().index_copy(0, index, update.flatten()[index]).view_as(update)


def _dare(updates: Tensor, density: float, seed: int, place: str) -> Tensor:
    """Drop entries at random, scale the rest up, and sum the updates (Yu et al. 2024)."""
    digest = hashlib.sha256(f"{seed}:{place}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
    mask = torch.rand(updates.shape, generator=generator, dtype=torch.float64).to(updates.device) < density
    return (updates * mask / density).sum(0)


def _check_compositions(spec: Spec, names: Sequence[str]) -> None:
    """Raise GC029 if an adaptation belongs to a composition that is neither a stack nor a bank combined in full.

    All members of a bank without sharing may be combined into one; other compositions do not compute a LoRA from their
    members.
    """
    for composition in spec.compose:
        inside = [name for name in composition.members if name in names]
        if not inside or isinstance(composition, Stack):
            continue
        own = isinstance(composition, Bank) and not composition.share and composition.slots is None
        whole_bank = own and len(inside) == len(composition.members)
        if not whole_bank:
            message = f"{inside[0]!r} is part of the composition {composition.name!r}"
            hint = "combine all adaptations of a bank, or pass compiled.fix a factor for each"
            raise GraftError("GC029", message, hint=hint)


def _spec(spec: Spec, like: Resolved, names: Sequence[str], new: LoRA) -> Spec:
    """Return the spec with the new LoRA in place of the first adaptation, and without the others."""
    adapt = [new if a.name == like.name else a for a in spec.adapt if a.name == like.name or a.name not in names]
    if sum(a.name == new.name for a in adapt) > 1:
        raise GraftError("GC005", f"another adaptation already has the name {new.name!r}")
    compose = (c for c in spec.compose if not any(member in names for member in c.members))
    return spec.model_copy(update={"adapt": tuple(adapt), "compose": tuple(compose)})
