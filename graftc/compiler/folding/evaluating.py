"""Evaluate parts of graphs in float64, so that certificates can compare folds and collapses.

Every floating-point value is float64, whatever the graph specifies: tensors that are read, dtypes among positional or
keyword arguments, and values that an operator itself creates (a mask, a constant). Values that a 16-bit graph rounds
are not rounded here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from graftc.compat.operators import GROUPED_MM
from graftc.passes.core.ir.cleaning import on_device
from graftc.passes.core.ir.program import above, map_nodes

aten = torch.ops.aten


def evaluate(output: fx.Node, inputs: Mapping[fx.Node, Any], tensor: Callable[[str], Tensor]) -> Tensor:
    """Return the value of ``output`` in float64, computed from other nodes' values and the tensors that it reads.

    Args and errors as for `evaluate_all`.
    """
    return evaluate_all((output,), inputs, tensor)[0]


def evaluate_all(
    outputs: Sequence[fx.Node], inputs: Mapping[fx.Node, Any], tensor: Callable[[str], Tensor]
) -> list[Tensor]:
    """Return the values of nodes in float64.

    All other values are released once the last node that reads them has been computed.

    Args:
        outputs: the nodes to evaluate; shared ancestors are computed once.
        inputs: values for nodes that are not computed; floating-point values are float64.
        tensor: returns a tensor of the Store by name, which is widened unless it is already float64.

    Raises:
        ValueError: if an output depends on an input of the graph that has no value.
    """
    order = [node for node in above(outputs, inputs) if node not in inputs]
    if unknown := [node for node in order if node.op == "placeholder"]:
        raise ValueError(f"{outputs[0]} reads {unknown[0]}, which has no value")
    left = Counter([*outputs, *(source for node in order for source in node.all_input_nodes)])
    values: dict[fx.Node, Any] = dict(inputs)
    device = next((value.device for value in inputs.values() if isinstance(value, Tensor)), None)
    for node in order:
        if node.op == "get_attr":
            values[node] = _wide(tensor(str(node.target)))
            device = device or values[node].device
            continue
        args, kwargs = map_nodes((node.args, dict(node.kwargs)), values.__getitem__)
        for source in node.all_input_nodes:
            left[source] -= 1
            if not left[source]:
                del values[source]
        args, kwargs = on_device(node.target, args, kwargs, device)
        values[node] = _call(node.target, args, kwargs)
        del args, kwargs
    return [values[output] for output in outputs]


def _call(target: Any, args: Any, kwargs: Any) -> Any:
    result = _REFERENCES.get(target, target)(
        *map(_wide, args), **{name: _wide(value) for name, value in kwargs.items()}
    )
    return [_wide(value) for value in result] if isinstance(result, tuple | list) else _wide(result)


def _wide(value: Any) -> Any:
    """Return a floating-point tensor or dtype as float64, and everything else unchanged."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def grouped_mm(
    x: Tensor,
    weight: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Compute ``aten._grouped_mm``, whose kernels take at most float32.

    Rows of ``x: [rows, in]`` are multiplied by their expert's matrix in ``weight: [experts, in, out]``; each group of
    rows ends at its entry in ``offs: int[experts]``. Rows after the last group are zero. Without ``offs``, there is
    one product per expert.

    Raises:
        NotImplementedError: for groups along other axes, which do not occur in a forward pass.
    """
    if weight.dim() != 3 or (x.dim() == 2) != (offs is not None):
        raise NotImplementedError(f"groups of {tuple(x.shape)} by {tuple(weight.shape)}")
    if offs is None:
        result = x @ weight
    else:
        result = x.new_zeros(x.shape[0], weight.shape[-1])
        ends = offs.tolist()
        for start, end, matrix in zip([0, *ends], ends, weight, strict=False):
            result[start:end] = x[start:end] @ matrix
    return result if bias is None else result + bias


_REFERENCES: Mapping[Any, Callable[..., Any]] = MappingProxyType({GROUPED_MM: grouped_mm})
"""Replacements for operators without a float64 kernel."""
