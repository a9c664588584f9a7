"""Compute the difference between a graph's output and the model's."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def difference_of(a: Any, b: Any) -> tuple[float, str]:
    """Return the difference between two outputs, relative to the largest element, and its description."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        same = type(a) is type(b) and not isinstance(a, Tensor) and bool(a == b)
        return (0.0, "") if same else (float("inf"), f"is {_brief(b)}, but the model's is {_brief(a)}")
    if a.shape != b.shape or a.dtype != b.dtype:
        return float("inf"), f"is {_brief(b)}, but the model's is {_brief(a)}"
    if torch.equal(a, b):
        return 0.0, ""
    if not (a.is_floating_point() or a.is_complex()):
        count = int((a != b).sum())
        return float("inf"), f"differs in {count} of {a.numel()} elements"
    unlike = ~((a == b) | (a.isnan() & b.isnan()))
    wide = torch.complex128 if a.is_complex() else torch.float64
    apart = (a.to(wide) - b.to(wide)).abs()[unlike]
    finite = a[a.isfinite()].to(wide).abs()
    scale = float(finite.max()) if finite.numel() else 0.0
    largest = float(apart.max()) if apart.numel() else 0.0
    if largest != largest or largest == float("inf") or (largest and not scale):
        return float("inf"), "differs in non-finite elements" if scale else "is not 0 where the model's is"
    return (largest / scale if largest else 0.0), f"differs by {largest:.2e}, its largest element is {scale:.2e}"


def _brief(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    return repr(value)[:40]
