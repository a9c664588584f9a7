"""Compare outputs that may contain infinities or NaN, such as masked scores and rows that are all padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def largest_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest absolute difference between two tensors; infinite if their shapes differ.

    Elements that are the same infinity, or NaN in both tensors, do not differ. The result is NaN if an element is NaN
    in only one of the tensors, or if no element of ``a`` is finite: such outputs cannot be compared.
    """
    if a.shape != b.shape:
        return math.inf
    if not a.numel():
        return 0.0
    if a.is_complex():
        a, b = torch.view_as_real(a.resolve_conj()), torch.view_as_real(b.to(a.dtype).resolve_conj())
    wide_a, wide_b = a.double(), b.to(a.device).double()
    largest = float((wide_a - wide_b).abs().max())
    if math.isfinite(largest):
        return largest
    if not bool(wide_a.isfinite().any()):
        return float("nan")
    same = (wide_a == wide_b) | (wide_a.isnan() & wide_b.isnan())
    return float((wide_a - wide_b).masked_fill(same, 0).abs().max())


def largest_number(a: Tensor) -> float:
    """Return the largest absolute value of the finite elements; 0 if there are none."""
    if not a.dtype.is_floating_point and not a.dtype.is_complex:
        return float(a.double().abs().max()) if a.numel() else 0.0
    if a.numel() and math.isfinite(largest := float(a.abs().max())):
        return largest
    finite = a[a.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0
