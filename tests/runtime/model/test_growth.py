"""A server that loads and drops adapters does not grow."""

from __future__ import annotations

import pytest

from graftc.passes.core.ir import codegen
from graftc.passes.core.ir.codegen import RecentCode
from graftc.runtime.activations import training_code
from tests.runtime.model.growing import Server, live_objects


@pytest.mark.slow
def test_a_server_that_loads_and_drops_adapters_does_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    few = RecentCode(40)
    monkeypatch.setattr(codegen, "RECENT", few)
    monkeypatch.setattr(training_code, "RECENT", few)
    server = Server()
    for _ in range(6):
        server.serve()
    before = live_objects()
    for _ in range(6):
        server.serve()
    more = live_objects() - before
    assert len(few) == 40
    assert {name: count for name, count in more.items() if count > 20} == {}, "each of six adapters has left something"
