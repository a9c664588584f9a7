"""A product with a block-circulant matrix, which is computed from the matrix's kernels by Fourier transforms.

Every block is circulant: each of its rows is the row above it, moved to the right by one, around the end. So its first
row, the kernel, determines it, and a product with it is a circular correlation. The matrix itself is never computed,
except by exports, whose formats have no or only limited Fourier transforms.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from graftc.passes.core.ops.autocasting import autocast_dtype
from graftc.passes.core.ops.declaring import operator

aten = torch.ops.aten


def circulant(call: Callable[..., Any], kernel: Any, axes: int, size: int) -> Any:
    """Return the matrix ``[..., m * size, n * size]`` of the kernels ``[..., m, n, size]``.

    Args:
        call: the function that applies an operator to its arguments, which are tensors or nodes.
        kernel: the kernels.
        axes: the number of their axes.
        size: the size of a kernel.
    """
    # Rows of a periodic sequence of width 2 size - 1, one less than two periods, begin one entry earlier each time.
    row = call(aten.unsqueeze.default, kernel, -2)
    sequence = call(aten.expand.default, row, [*(-1 for _ in range(axes - 1)), 2 * size - 1, size])
    sequence = call(aten.flatten.using_ints, sequence, -2)
    blocks = call(aten.slice.Tensor, call(aten.unflatten.int, sequence, -1, [size, 2 * size - 1]), -1, 0, size)
    blocks = call(aten.movedim.int, blocks, -2, -3)
    return call(aten.flatten.using_ints, call(aten.flatten.using_ints, blocks, -4, -3), -2)


def matrix_of(kernel: Tensor) -> Tensor:
    """Return the matrix ``[..., m * size, n * size]`` of the kernels ``[..., m, n, size]``."""
    matrix: Tensor = circulant(lambda target, *args: target(*args), kernel, kernel.dim(), kernel.shape[-1])
    return matrix


def circulant_product_decomposed(x: Tensor, kernel: Tensor) -> Tensor:
    """Compute `circulant_product` as a product with the matrix."""
    return torch.nn.functional.linear(x, matrix_of(kernel))


def _spectra(values: Tensor, size: int) -> Tensor:
    """Return the Fourier transforms of the last axis in parts of this size, ``[..., parts, frequencies]``."""
    wide = torch.promote_types(values.dtype, torch.float32)
    transformed: Tensor = torch.fft.rfft(values.to(wide).reshape(*values.shape[:-1], -1, size))
    return transformed


def _values(spectra: Tensor, size: int) -> Tensor:
    parts: Tensor = torch.fft.irfft(spectra, n=size)
    return parts.flatten(-2)


def _product_like(x: Tensor, kernel: Tensor) -> Tensor:
    shape = (*x.shape[:-1], kernel.shape[0] * kernel.shape[-1])
    return x.new_empty(shape, dtype=_result_dtype(x))


def _result_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype that a product with a matrix has, also under autocast."""
    return (autocast_dtype(x) if x.dtype != torch.float64 else None) or x.dtype


def _setup(ctx: Any, inputs: Sequence[Any], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    x, kernel = ctx.saved_tensors
    grads: tuple[Tensor, Tensor] = torch.ops.graftc.circulant_product_backward(grad, x, kernel)
    return grads


def _grads_like(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x, memory_format=torch.contiguous_format), torch.empty_like(kernel)


@operator(_grads_like)
def circulant_product_backward(grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `circulant_product` for ``x`` and ``kernel``."""
    size = kernel.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        above, own, factors = _spectra(grad, size), _spectra(x, size), _spectra(kernel, size).squeeze(-2)
        grad_x = _values(torch.einsum("...mf,mnf->...nf", above, factors), size)
        above, own = above.flatten(0, -3), own.flatten(0, -3)
        grad_kernel: Tensor = torch.fft.irfft(torch.einsum("tmf,tnf->mnf", above.conj(), own), n=size)
        return grad_x.to(x.dtype), grad_kernel.to(kernel.dtype).contiguous()


@operator(_product_like, plain=circulant_product_decomposed, gradient=(_setup, _backward))
def circulant_product(x: Tensor, kernel: Tensor) -> Tensor:
    """Return the product of a block-circulant matrix and ``x: [..., n * size]``, as ``[..., m * size]``.

    Transforms and products of tensors in 16 bits are computed in float32. The gradient is not differentiable.

    Args:
        x: the values.
        kernel: the first rows of the blocks, ``[m, n, size]``.
    """
    size = kernel.shape[-1]
    with torch.autocast(x.device.type, enabled=False):
        factors = _spectra(kernel, size).squeeze(-2)
        product = torch.einsum("...nf,mnf->...mf", _spectra(x, size), factors.conj())
        result = _values(product, size)
    return result.to(_result_dtype(x)).contiguous()
