"""Names of operators, grouped by what they do to the columns of a value."""

from __future__ import annotations


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


PASSING = _names(
    """
    to _to_copy type_as dropout native_dropout feature_dropout contiguous clone detach alias
    lift_fresh_copy set_grad_enabled
    """
)
"""Results with the values (up to precision and dropped entries) and the shape of the first operand."""

RESHAPING = _names("view reshape _unsafe_view flatten unflatten expand expand_as broadcast_to unsqueeze squeeze")
"""Results with the entries of the first operand in the same order."""

MOVING = RESHAPING | _names(
    "transpose permute slice select narrow t numpy_T mT movedim moveaxis swapaxes getitem index"
)
"""Results with some or all entries of the first operand."""

ADDING = _names("add sub lerp addcmul")
"""Sums of two values, also with fixed weights."""

PRODUCTS = _names("matmul bmm baddbmm einsum")
SOFTMAX = _names("softmax _softmax")
WRITING = _names("copy index_put fill masked_scatter")
"""In-place operators that write into (a view of) their first operand."""

VIEWING = _names(
    """
    view reshape transpose permute slice select narrow t expand expand_as broadcast_to unsqueeze squeeze getitem detach
    alias movedim moveaxis swapaxes swapdims unflatten flatten diagonal
    """
)
"""Operators whose result shares memory with the first operand."""

SHAPING = _names(
    """
    view reshape _unsafe_view view_as reshape_as transpose permute t numpy_T mT matrix_H swapaxes movedim slice
    select narrow split split_with_sizes chunk tensor_split unbind expand expand_as unsqueeze squeeze
    flatten unflatten roll flip repeat repeat_interleave unfold pixel_shuffle pixel_unshuffle diagonal
    unsafe_chunk unsafe_split broadcast_to moveaxis swapdims tile hsplit vsplit dsplit adjoint ravel
    """
)
"""Operators that are run for real on column indices."""

JOINING = _names("cat stack concat concatenate hstack vstack dstack column_stack")
FILLING = _names("slice_scatter select_scatter diagonal_scatter")
"""Copies of the first operand with a part taken from the second."""

PADDING = _names("pad constant_pad_nd")
NORMALISING = _names("layer_norm rms_norm native_layer_norm group_norm batch_norm instance_norm")
POOLING = _names("sum mean amax amin max min cumsum cumprod logcumsumexp std var logsumexp")
"""Operators that pool along the axes that their second argument names."""

RESIZING = _names(
    """
    max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d upsample_nearest1d upsample_nearest2d upsample_linear1d
    upsample_bilinear2d upsample_bicubic2d _upsample_bilinear2d_aa _upsample_bicubic2d_aa grid_sampler grid_sampler_2d
    """
)
"""Operators that pool or interpolate along spatial axes, which the sizes tell."""

PICKING = _names("index gather index_select masked_select")
"""Operators that pick rows, and leave columns alone where they work on other axes."""

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

SELECTING = _names(
    """
    transpose permute t mT swapaxes slice select narrow split split_with_sizes chunk unbind squeeze unsqueeze expand
    getitem index index_select view reshape
    """
)
"""Operators between a stack of matrices and the ones that a product reads."""

RUNNING = _names(
    """
    cumsum cumprod logcumsumexp cummax cummin roll scan associative_scan while_loop fft_fft fft_fft2 fft_fftn fft_rfft
    fft_rfftn fft_rfft2 fft_irfft fft_irfft2 fft_irfftn fft_ifft fft_ifft2
    """
)
"""Operators whose result depends on several entries along an axis, and that no pooling is."""
