"""Checks of values and sizes that a tracer records; torch has them as functions with an underscore only."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def check(condition: Any) -> None:
    """Require a condition, which may compare symbolic sizes: a tracer then takes it for granted."""
    torch._check(condition)  # type: ignore[no-untyped-call]


@contextmanager
def told_of_value_checks(tell: Callable[[Any], None]) -> Iterator[None]:
    """Tell a function the message of each check of a tensor's values that the block makes, before it is made.

    torch tells nobody: its function is replaced meanwhile.
    """
    original: Any = torch._check_tensor_all

    def told(condition: Any, message: Any = None) -> None:
        tell(message)
        original(condition, message)

    with mock.patch.object(torch, "_check_tensor_all", told):
        yield
