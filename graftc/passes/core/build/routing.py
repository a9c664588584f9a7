"""Random routing among experts of an adaptation: one for each forward pass while training, their mean in eval mode.

Experts are one tensor with a leading axis. A route is a number that is drawn in the graph, so that every forward pass,
compiled or not, has its own, and a layer that is computed again in the backward pass has the same one. What is picked
by it is the only reader: deriving the eval graph makes each pick a mean (`graftc.passes.core.ir.eval_mode`, which knows
them by `graftc.passes.core.ir.routes`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.method.capabilities import Reading

aten = torch.ops.aten


def route(build: Builder, experts: fx.Node) -> fx.Node:
    """A number of ``[0, M)`` for ``experts: [M, ...]``, drawn anew in every forward pass, ``int64[1]``."""
    count = int(experts.meta["val"].shape[0])
    like = build.call(aten.new_zeros.default, experts, [1], dtype=torch.int64, part="route")
    return build.call(aten.randint_like.low_dtype, like, 0, count, part="route")


def pick(build: Builder, experts: fx.Node, chosen: fx.Node, part: str = "expert") -> fx.Node:
    """The expert of ``experts: [M, ...]`` that a `route` says; in eval mode the mean of all."""
    found = build.call(aten.index_select.default, experts, 0, chosen, part=part)
    return build.call(aten.squeeze.dim, found, 0, part=part)


def route_of(part: str) -> Reading:
    """The number of the expert of ``part`` that `pick` has taken, as the figure ``PART_route``."""
    return Reading(f"{part}_route", part, (aten.index_select.default,), _chosen)


def _chosen(args: Sequence[Any], _: Tensor) -> Tensor:
    number: Tensor = args[2]
    return number.squeeze()
