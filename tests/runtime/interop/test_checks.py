"""The lists in errors about PEFT's folders."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from graftc.runtime.interop.peft.checks import check_copies
from graftc.specs.errors.diagnostics import Place
from tests.kit.refusals import refused


@pytest.mark.parametrize(("count", "listed"), [(1, 1), (6, 6), (50, 50), (51, 50), (1000, 50)])
def test_an_error_lists_at_most_fifty_tensors(count: int, listed: int) -> None:
    """Five are in the message and the others below it; each is there once, however many follow that are left out."""
    names = [f"tensor_{number:04}" for number in range(count)]
    config = SimpleNamespace(peft_type="LORA")
    adapter: Any = SimpleNamespace(copies=dict(zip(names, names, strict=True)), config=config, place=Place())
    error = refused(check_copies, adapter, {}, lambda name: None)
    shown = [name for name in names if name in error.message or name in error.details]
    assert error.code == "GC113" and shown == names[:listed]
    assert all((name in error.message) is (place < 5) for place, name in enumerate(shown))
