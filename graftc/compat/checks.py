"""Checks of values and sizes that a tracer records; torch offers them only as private functions."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch


def check(condition: Any) -> None:
    """Require a condition, which may compare symbolic sizes; a tracer then assumes that it holds."""
    torch._check(condition)  # type: ignore[no-untyped-call]


@contextmanager
def told_of_value_checks(tell: Callable[[Any], None]) -> Iterator[None]:
    """Call ``tell`` with the message of each check of a tensor's values in the block, before the check is made.

    torch has no such callback, so its function is replaced while the block runs.
    """
    original: Any = torch._check_tensor_all

    def told(condition: Any, message: Any = None) -> None:
        tell(message)
        original(condition, message)

    with mock.patch.object(torch, "_check_tensor_all", told):
        yield
