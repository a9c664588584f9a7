"""2,000 steps of a machine over caches, each equal to recomputation without a cache."""

from __future__ import annotations

from collections import Counter

import pytest

from tests.runtime.model.cache_machine import SETUPS, TOLERANCE, run

pytestmark = pytest.mark.gate

STEPS, RUNS = 2500, 3


def test_every_step_is_as_without_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    each = -(-STEPS // (RUNS * len(SETUPS)))
    machines = [run(setup, seed, each) for setup in SETUPS for seed in range(RUNS)]
    done = sum((machine.done for machine in machines), Counter[str]())
    worst = max(machine.worst for machine in machines)
    with capsys.disabled():
        print(f"\n{each * len(machines)} steps, {done.total()} of them with effect: {dict(done)}")
        print(f"largest difference {worst:.1e} of the largest logit, tolerance {TOLERANCE:.0e}")
    assert done.total() >= 2000
    assert len(done) == 13 and min(done.values()) >= 40
