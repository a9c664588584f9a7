"""A thousand adapters in one process, loaded and dropped."""

from __future__ import annotations

import resource

import pytest

from graftc.passes.core.ir.codegen import RECENT
from tests.runtime.model.growing import Server, live_objects

pytestmark = pytest.mark.gate
SIZES, TORCH = "symbolic_shapes", 256
"""Torch's caches of the sizes of the latest captures: part of their objects' names, and their number of entries."""


def test_a_thousand_adapters_leave_nothing() -> None:
    server = Server()
    for _ in range(200):  # enough to fill `RECENT`
        server.serve()
    assert len(RECENT) == RECENT.most
    before, memory = live_objects(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(1000):
        server.serve()
    more = {
        name: count for name, count in (live_objects() - before).items() if count > (TORCH if SIZES in name else 100)
    }
    assert more == {}
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 50 * 1024, "kilobytes"
