"""New tokens: trained rows replace some rows of an embedding table, wherever the table is looked up, and in the head.

The table itself is never copied: a look-up uses a new row if the token id refers to one, and the head computes its last
columns from the new rows. A table and a head that are tied share one set of new rows.
"""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.sites.sites import EmbeddingSite, LinearSite
from graftc.passes.core.weights.weight_slice import WeightSlice

aten = torch.ops.aten


def insert_tokens(build: Builder, sites: list[LinearSite], rows: WeightSlice) -> None:
    """Train ``rows`` of a table instead of reading the base's.

    Args:
        build: the builder of the Program.
        sites: all sites that read the table: look-ups, and the head if it is tied; or only the head's matrix.
        rows: the new entries of the table, ``[entries, width]``, as a single run.
    """
    ((first, end),) = rows.spans
    for site in sites:
        with build.on(site):
            trained = build.cast(build.trained_rows(rows), build.store.get(rows.tensor).dtype)
            if isinstance(site, EmbeddingSite):
                _look_up(build, site, trained, first, end)
            else:
                _project(build, site, trained)


def _look_up(build: Builder, site: EmbeddingSite, trained: fx.Node, first: int, end: int) -> None:
    numbers = build.input(site)
    own = build.call(aten.clamp.default, build.call(aten.sub.Tensor, numbers, first), 0, end - first - 1)
    new = build.call(aten.embedding.default, trained, own, part="new rows")
    after, before = build.call(aten.ge.Scalar, numbers, first), build.call(aten.lt.Scalar, numbers, end)
    is_new = build.call(aten.unsqueeze.default, build.call(aten.logical_and.default, after, before), -1)
    build.set_output(site, build.call(aten.where.self, is_new, new, build.output(site), part="new rows"))


def _project(build: Builder, site: LinearSite, trained: fx.Node) -> None:
    own = build.map(site, build.input(site), trained, part="new columns")
    bias = build.bias(site)
    if bias is not None:
        own = build.call(aten.add.Tensor, own, bias, part="new columns")
    build.set_output(site, own, part="new columns")
