"""A sample of the operations that `tests/gates/test_caches.py` runs."""

from __future__ import annotations

import pytest

from tests.runtime.model.cache_machine import SETUPS, TOLERANCE, run

pytestmark = pytest.mark.slow


@pytest.mark.sample("shifted prefix")
@pytest.mark.parametrize("setup", SETUPS)
def test_steps_over_a_cache(setup: str) -> None:
    machine = run(setup, 7, 12)
    assert machine.done.total() >= 8 and machine.worst <= TOLERANCE
