"""Tensors that have a type and no values: torch has no public name for them, or for what goes wrong with them."""

from __future__ import annotations

from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)

__all__ = [
    "DataDependentOutputException",
    "DynamicOutputShapeException",
    "FakeTensor",
    "FakeTensorMode",
    "enable_python_dispatcher",
    "is_faking",
]


def is_faking() -> bool:
    """Return whether this thread runs on tensors without values, as code that is being traced does."""
    return detect_fake_mode() is not None
