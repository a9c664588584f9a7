"""Checkpoints of every type that works, on every family, in and out, judged by the installed peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.checkpoints import EVERY, KINDS, Checkpoint, check

pytestmark = pytest.mark.gate


def test_there_are_sixty_of_eight_families_and_all_types() -> None:
    assert len(EVERY) >= 60 and len({case.family for case in EVERY}) == 8
    types = {str(case.config().peft_type.value) for case in EVERY}
    assert types == {
        *("LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "LN_TUNING", "TRAINABLE_TOKENS"),
        *("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
    }
    assert {case.name for case in EVERY} == set(KINDS)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_in_and_out(case: Checkpoint, tmp_path: Path) -> None:
    """Outputs within 1e-5 of peft's both times; peft finds every tensor that it trains, and no other."""
    check(case, tmp_path)
