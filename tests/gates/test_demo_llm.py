"""``make demo-llm`` unchanged: the real model compared with PEFT. It takes minutes on two otherwise idle cores."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from graftc.applications.demo.llm import run_llm_demo

pytestmark = pytest.mark.gate


@pytest.mark.parametrize("quick", [True, False])
def test_the_real_model_learns_as_with_peft_and_says_the_same_in_every_form(quick: bool, tmp_path: Path) -> None:
    result = run_llm_demo(tmp_path / "out", quick=quick, console=Console(width=110))
    print(json.dumps({key: result.to_json()[key] for key in ("scores", "training", "same_tokens", "seconds")}))
    assert result.passed, result.failures
    assert (result.scores.peft is None) == quick
    assert result.seconds["total"] < (240 if quick else 900)
    for before, after in zip(result.scores.untuned.accuracies, result.scores.graftc.accuracies, strict=True):
        assert after >= before + 0.20
