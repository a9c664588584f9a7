"""Lily: shared low-rank factors with a router for each layer (Zhong et al. 2024, arXiv:2407.09946)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx

from graftc.passes.core.build.batch import Batch, batch_input
from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.lowrank import uniform, zeros
from graftc.passes.core.method.method import Method
from graftc.passes.core.sites.sites import LinearSite, Site, SiteKey
from graftc.passes.core.weights.folds import Fold, Keep
from graftc.passes.graph.compose import token_mean
from graftc.specs.methods.lily import Lily, kind_of

aten = torch.ops.aten

Owners: TypeAlias = Mapping[SiteKey, tuple[Site, Site]]
"""For each place, the first of the sites that share its ``A``, and the first of those that share its ``B``."""


class LilyMethod(Method[Lily, LinearSite]):
    """``y = W x + b + s C h`` with ``h = A x``, ``C = sum_e p_e B_e`` and ``p = mean softmax(R h)``.

    The mean is over all rows and tokens. ``A`` and ``R`` are drawn uniformly within ``±1 / sqrt(columns)``, Kaiming's
    bound for ``a = sqrt(5)``. Shared tensors are stored with the name of the first site that has them.
    """

    def prepare(self, spec: Lily, sites: Sequence[LinearSite], build: Builder) -> Owners:
        """Determine which sites share tensors, from all places of the model, some of which a graph may lack."""
        groups: dict[Hashable, dict[SiteKey, LinearSite]] = defaultdict(dict)
        for site in build.places.get(build.adaptation, sites):
            assert isinstance(site, LinearSite)
            own = kind_of(site.key.module), site.key.name, site.key.part, site.in_features, site.out_features
            groups[own].setdefault(site.key.place, site)
        owners: dict[SiteKey, tuple[Site, Site]] = {}
        for group in groups.values():
            members = list(group.values())
            for number, key in enumerate(group):
                owners[key] = members[number - number % spec.stride_a], members[0]
        return owners

    def insert(self, spec: Lily, site: LinearSite, shared: Owners, build: Builder) -> None:
        """Insert the branch.

        Raises:
            GraftError: GC017 at a convolution with groups; GC037 if the axis of rows cannot be found in a site's
                values.
        """
        first, first_of_all = shared[site.key.place]
        rank, count, dtype = spec.rank, spec.num_b, site.dtype
        a = build.parameter("A", (rank, site.in_features), uniform, dtype=dtype, owner=first)
        b = build.parameter("B", (count * rank, site.out_features), zeros, dtype=dtype, owner=first_of_all)
        router = build.parameter("R", (count, rank), uniform, dtype=dtype)
        hidden = build.map(site, build.input(site), a, part="down")
        weights = build.call(aten.mul.Tensor, _mean_choice(spec, build, hidden, router), spec.scaling, part="scale")
        flat = build.call(aten.view.default, b, [count, rank * site.out_features], part="mixed")
        mixed = build.call(aten.matmul.default, weights, flat, part="mixed")
        mixed = build.call(aten.view.default, mixed, [rank, site.out_features], part="mixed")
        build.add(site, build.call(aten.matmul.default, hidden, mixed, part="up"))

    def fold(self, spec: Lily, site: LinearSite, tensors: Mapping[str, Tensor]) -> Fold:
        """Keep the adaptation in the graph, since the mixture depends on the batch."""
        return Keep("its router averages over the tokens of a batch, so no weight can contain its effect")


def _mean_choice(spec: Lily, build: Builder, hidden: fx.Node, router: fx.Node) -> fx.Node:
    """Return the mean of the router's probabilities over rows and tokens, ``[num_b]``."""
    scores = build.linear(hidden, router, None, "router")
    choice = build.call(aten.softmax.int, scores, -1, part="router")
    if batch_input(build.program) is not None:
        choice = Batch(build).first(choice, str(build.site.key))
    return token_mean(build, choice, range(choice.meta["val"].dim() - 1), real=spec.tokens == "real")
