"""Random routing among the experts of an adaptation: one per forward pass while training, their mean in eval mode.

The experts are one tensor with a leading axis. A route is a number that is drawn in the graph, so that every forward
pass, compiled or not, has its own, and a layer that is recomputed in the backward pass has the same one. Only picks
read a route: deriving the eval graph turns each pick into a mean (`graftc.passes.core.ir.eval_mode`, which recognises
picks with `graftc.passes.core.ir.routes`).
"""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.operations import drawn_beside

aten = torch.ops.aten


def route(build: Builder, experts: fx.Node) -> fx.Node:
    """Return a number of ``[0, M)`` for ``experts: [M, ...]``, drawn again in every forward pass, ``int64[1]``."""
    return drawn_beside(build, experts, int(experts.meta["val"].shape[0]), "route")


def pick(build: Builder, experts: fx.Node, chosen: fx.Node, part: str = "expert") -> fx.Node:
    """Return the expert of ``experts: [M, ...]`` that a `route` selects; in eval mode the mean of all."""
    selected = build.call(aten.index_select.default, experts, 0, chosen, part=part)
    return build.call(aten.squeeze.dim, selected, 0, part=part)
