"""Names of operators, grouped by what they do to the columns of a value.

Operators that only move entries are listed in the table of `graftc.passes.core.sites.moves`; this module defines which
groups of them each analysis of a graph accepts.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from graftc.passes.core.sites.calls import op_name
from graftc.passes.core.sites.moves import Move, names_of


def beneath(node: fx.Node, names: Collection[str]) -> fx.Node:
    """Return the value behind a node after skipping operators with these names, along first operands."""
    while op_name(node) in names and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PASSING = names_of(Move.COPY, Move.CAST) | _names("dropout native_dropout feature_dropout set_grad_enabled")
"""Operators whose result has the first operand's shape and values (up to precision and dropped entries)."""

RESHAPING = names_of(Move.RESHAPE, Move.BROADCAST)
"""Operators whose result has the first operand's entries in the same order."""

MOVING = RESHAPING | names_of(Move.PERMUTE, Move.CUT, Move.ITEM, Move.PICK)
"""Operators whose result has some or all of the first operand's entries."""

ADDING = _names("add sub lerp addcmul")
"""Sums of two values, with or without fixed weights."""

PRODUCTS = _names("matmul bmm baddbmm einsum")
SOFTMAX = _names("softmax _softmax _safe_softmax")
WRITING = _names("copy index_put fill masked_scatter")
"""In-place operators that write into (a view of) their first operand."""

VIEWING = RESHAPING | names_of(Move.PERMUTE, Move.CUT, Move.SPLIT, Move.ITEM) | _names("detach alias")
"""Operators whose result shares memory with the first operand."""

SHAPING = RESHAPING | names_of(Move.PERMUTE, Move.REORDER, Move.CUT, Move.SPLIT, Move.REPEAT)
"""Operators whose result consists only of the first operand's entries, at places determined by the arguments."""

PADDING = names_of(Move.PAD)
NORMALISING = _names("layer_norm rms_norm native_layer_norm group_norm batch_norm instance_norm")
POOLING = _names("sum mean amax amin max min cumsum cumprod logcumsumexp std var logsumexp")
"""Operators that pool along the axes in their second argument."""

RESIZING = _names(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d
    """
)
"""Operators that pool or interpolate along spatial axes, which are inferred from the sizes."""

CREATING = _names(
    """
    empty new_empty empty_like zeros new_zeros zeros_like ones full empty_permuted
    """
)
POINTWISE = _names("prelu rrelu hardswish hardsigmoid mish softplus where masked_fill masked_scatter")
"""Operators that lack PyTorch's pointwise tag but also keep the columns of their first operand."""

NONLINEAR = _names(
    """
    gelu silu relu relu6 sigmoid tanh exp erf softplus elu selu celu leaky_relu hardswish hardsigmoid
    hardtanh mish log_sigmoid prelu rrelu square swish glu
    """
)
"""Activations, and the operators that written-out activations consist of."""

SELECTING = MOVING | names_of(Move.SPLIT)
"""Operators that may occur between a stack of matrices and the matrices that a product reads."""

RUNNING = _names(
    """
    cumsum cumprod logcumsumexp cummax cummin roll scan associative_scan while_loop fft_fft fft_fft2 fft_fftn fft_rfft
    fft_rfftn fft_rfft2 fft_irfft fft_irfft2 fft_irfftn fft_ifft fft_ifft2
    """
)
"""Operators other than pooling whose result depends on several entries along an axis."""
