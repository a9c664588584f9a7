"""Names of operators, grouped by what they do to the columns of a value."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

_NAMES: dict[Any, str] = {}


def op_name(node: fx.Node) -> str:
    """Name of the operator without namespace, overload and in-place mark; empty for other nodes."""
    if node.op != "call_function":
        return ""
    name = _NAMES.get(node.target)
    if name is None:
        target = node.target
        if isinstance(target, torch._ops.OpOverload):
            name = target._schema.name.split("::")[1]
            name = name if name.endswith("__") else name.removesuffix("_")
        else:
            name = "getitem" if target is operator.getitem else getattr(target, "__name__", str(target))
        _NAMES[target] = name
    return name


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


CONVOLUTIONS = _names("conv1d conv2d conv3d convolution conv_transpose1d conv_transpose2d")
PASSING = _names(
    """
    to _to_copy type_as dropout native_dropout feature_dropout contiguous clone detach alias
    lift_fresh_copy set_grad_enabled
    """
)
"""Results with the values (up to precision and dropped entries) and the shape of the first operand."""

RESHAPING = _names("view reshape _unsafe_view flatten unflatten expand unsqueeze squeeze")
"""Results with the entries of the first operand in the same order."""

MOVING = RESHAPING | _names("transpose permute slice select narrow t numpy_T getitem index")
"""Results with some or all entries of the first operand."""

PRODUCTS = _names("matmul bmm baddbmm einsum")
SOFTMAX = _names("softmax _softmax")
WRITING = _names("copy index_put fill masked_scatter")
"""In-place operators that write into (a view of) their first operand."""

VIEWING = _names("view reshape transpose permute slice select narrow t expand unsqueeze squeeze getitem detach alias")
"""Operators whose result shares memory with the first operand."""

SHAPING = _names(
    """
    view reshape _unsafe_view view_as transpose permute t numpy_T mT matrix_H swapaxes movedim slice
    select narrow split split_with_sizes chunk tensor_split unbind expand expand_as unsqueeze squeeze
    flatten unflatten roll flip repeat repeat_interleave unfold pixel_shuffle pixel_unshuffle diagonal
    unsafe_chunk unsafe_split
    """
)
"""Operators that are run for real on column indices."""

JOINING = _names("cat stack concat hstack vstack")
PADDING = _names("pad constant_pad_nd")
NORMALISING = _names("layer_norm rms_norm native_layer_norm group_norm batch_norm instance_norm")
ROWWISE = _names("index gather index_select sum mean amax masked_select")
"""Operators that pick or pool rows, and leave columns alone where they work on other axes."""

PICKING = _names("index gather index_select")
"""Those of them that pick."""

CREATING = _names(
    """
    empty new_empty empty_like zeros new_zeros zeros_like ones full empty_permuted
    """
)
POINTWISE = _names("prelu rrelu hardswish hardsigmoid mish softplus where masked_fill")
"""Elementwise operators without the tag that says so."""

NONLINEAR = _names(
    """
    gelu silu relu relu6 sigmoid tanh exp erf softplus elu selu celu leaky_relu hardswish hardsigmoid
    hardtanh mish log_sigmoid prelu rrelu square swish glu
    """
)
"""Activations, and what written-out ones are made of."""
