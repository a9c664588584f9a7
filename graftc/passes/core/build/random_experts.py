"""Random routing among an adaptation's experts: one expert per forward pass in train mode, their mean in eval mode.

The experts are stored in one tensor with a leading expert axis. A route is an index drawn in the graph, so that
every forward pass, compiled or not, draws its own index, and a layer recomputed in the backward pass uses the same
index. Only picks read a route: deriving the eval graph turns each pick into a mean
(`graftc.passes.core.ir.eval_mode`, which recognises picks with `graftc.passes.core.ir.routes`).
"""

from __future__ import annotations

import torch
from torch import fx

from graftc.passes.core.build.builder import Builder
from graftc.passes.core.build.operations import drawn_beside

aten = torch.ops.aten


def route(build: Builder, experts: fx.Node) -> fx.Node:
    """Return a random index, ``int64[1]`` in ``[0, M)``, for ``experts: [M, ...]``, redrawn in every forward pass."""
    return drawn_beside(build, experts, int(experts.meta["val"].shape[0]), "route")


def pick(build: Builder, experts: fx.Node, chosen: fx.Node, part: str = "expert") -> fx.Node:
    """Return the expert of ``experts: [M, ...]`` that a `route` selects; in eval mode, the mean of all experts."""
    selected = build.call(aten.index_select.default, experts, 0, chosen, part=part)
    return build.call(aten.squeeze.dim, selected, 0, part=part)
