"""Checkpoints of every supported type, on every family, imported and exported, judged by the installed peft."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.runtime.interop.checkpoints import EVERY, IN_SIXTEEN_BITS, KINDS, Checkpoint, check, check_in_sixteen_bits

pytestmark = pytest.mark.gate


def test_there_are_sixty_of_eight_families_and_all_types() -> None:
    assert len(EVERY) >= 60 and len({case.family for case in EVERY}) == 8
    types = {str(case.config().peft_type.value) for case in EVERY}
    assert types == {
        *("LORA", "ADALORA", "IA3", "VERA", "LOHA", "LOKR", "LN_TUNING", "TRAINABLE_TOKENS"),
        *("OFT", "BOFT", "HIRA", "MISS", "SHIRA", "GRALORA", "C3A", "LILY"),
        *("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"),
    }
    assert {case.name for case in EVERY} == set(KINDS)


@pytest.mark.parametrize("case", EVERY, ids=str)
def test_in_and_out(case: Checkpoint, tmp_path: Path) -> None:
    """Outputs are within 1e-5 of peft's both times; peft loads exactly the tensors that it trains."""
    check(case, tmp_path)


@pytest.mark.parametrize("case", [case for case in EVERY if case.name in IN_SIXTEEN_BITS], ids=str)
def test_in_sixteen_bits(case: Checkpoint, tmp_path: Path) -> None:
    """Updates are equal, and outputs at most 1.2 times as far from float32 as peft's."""
    ours, theirs = check_in_sixteen_bits(case, tmp_path / "theirs")
    print(f"{case}: {ours:.2e}, peft {theirs:.2e}, {ours / theirs:.2f}")
    assert 0 < ours <= 1.2 * theirs
