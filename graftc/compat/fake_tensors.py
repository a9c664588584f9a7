"""Tensors with a type but no values: torch has no public names for them or for the errors that they raise."""

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
    """Return whether this thread is running on fake tensors, as code does while it is traced."""
    return detect_fake_mode() is not None
