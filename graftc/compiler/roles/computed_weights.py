"""Map the output columns of a linear map with a computed weight to rows of the stored parameter.

``nn.MultiheadAttention`` reads slices of one parameter; other models multiply by ``W.T``. The shape operators in
between are run on row and column indices, as broadcast views that use no memory.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, fx

from graftc.compiler.roles.flow import Flow
from graftc.compiler.roles.maps import Linear, columns_along
from graftc.compiler.roles.operators import PASSING
from graftc.passes.core.sites.moves import moved_along

_ELEMENTWISE = PASSING | {"mul", "div", "add"}


def parameter_rows(flow: Flow, linear: Linear) -> tuple[Tensor, int] | None:
    """Return the parameter's row for each output column, and the parameter's number of rows.

    Rows are those of the weight viewed as ``[out, in]``, however it is stored.

    Returns:
        ``int64[out]`` and the total; None if the weight is the parameter itself or a stack of experts, or if the rows
        cannot be determined.
    """
    if linear.weight.op == "get_attr" or linear.experts or linear.parameter is None:
        return None
    chain = _chain(flow, linear)
    if chain is None:
        return None
    shape = tuple(int(size) for size in chain[0].meta["val"].shape)
    # A matrix may be stored in either orientation; the rows of a kernel are along its first axis.
    for axis in range(2 if len(shape) == 2 else 1):
        total = shape[axis]
        numbers = moved_along(pairwise(chain), columns_along(shape, (axis,)), flow.number, _ELEMENTWISE)
        if numbers is None or numbers.dim() <= max(linear.out_axes):
            continue
        others = [axis for axis in range(numbers.dim()) if axis not in linear.out_axes]
        oriented = numbers.permute(*linear.out_axes, *others).reshape(linear.out, -1)
        own = oriented[:, 0]
        same = torch.equal(oriented, own[:, None].expand_as(oriented))
        if same and bool((own >= 0).all()) and torch.unique(own).numel() == linear.out:
            return own, total
    return None


def _chain(flow: Flow, linear: Linear) -> list[fx.Node] | None:
    """Return the nodes from the stored parameter to the weight; None if they cannot be traced."""
    chain = [linear.weight]
    while chain[0].op == "call_function":
        sources = [n for n in chain[0].all_input_nodes if _leads_to(flow, n, str(linear.parameter))]
        if not sources:
            return None
        chain.insert(0, sources[0])
    return chain


def _leads_to(flow: Flow, node: fx.Node, parameter: str) -> bool:
    return any(str(n.target) == parameter for n in flow.parameters(node))
