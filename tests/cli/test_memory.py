"""``graftc check --memory``: the plan of a spec, and a table of methods."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

import graftc
from graftc.cli.schemas import published_schema
from graftc.testing.families import bert
from tests.cli.support import run_here, run_valid

BERT = "graftc.testing.families:bert"
SPEC = "adapt: [{method: lora, target: {role: [attn.q, attn.v]}, rank: 2}]\n"


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.full
def test_the_plan_is_that_of_python_and_the_table_has_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch", "2", "--seq", "16", "--methods", "dora,full:**.output.dense,vera")
    outcome = run_here(capsys, "check", "spec.yaml", "-m", BERT, "--meta", *options, "--json")
    assert outcome.status == 0
    assert not list(Draft202012Validator(published_schema("check")).iter_errors(outcome.data))
    memory = outcome.data["memory"]
    assert memory["plan"] == graftc.plan("spec.yaml", bert(), batch=2, sequence=16).to_json()
    table = [row for row in memory["table"] if not row["quantize"]]
    assert len(memory["table"]) == 2 * len(table)  # each on the unquantised base and on nf4
    rows = [(row["method"], row["checkpoint"], row["chunked"]) for row in table]
    # A classifier over three classes has no loss to chunk.
    names = ("dora", "full:**.output.dense", "vera")
    assert rows == [(name, checkpoint, False) for name in names for checkpoint in (False, True)]
    peaks = [row["plan"]["peak"] for row in table]
    assert all(plain > checkpointed for plain, checkpointed in zip(peaks[::2], peaks[1::2], strict=True))


@pytest.mark.full
def test_what_does_not_fit_is_the_answer_no(capsys: pytest.CaptureFixture[str]) -> None:
    options = ("--batch", "64", "--seq", "32", "--memory-budget", "2MB")
    outcome = run_here(capsys, "check", "spec.yaml", "-m", BERT, *options)
    assert outcome.status == 1
    assert "does not fit in 2.00 MB; largest batch" in outcome.out


@pytest.mark.parametrize(
    "option",
    [
        *(["--batch", "1"], ["--seq", "8"], ["--dtype", "float16"], ["--no-checkpoint"], ["--optimizer", "sgd"]),
        *(["--devices", "2"], ["--device", "cpu"], ["--accumulate"]),
    ],
)
def test_options_of_a_plan_that_is_not_made(option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """They are refused before a model is loaded."""
    error = run_valid(capsys, "check", "nowhere.yaml", "-m", "nowhere", *option, status=2)["error"]
    assert error["code"] == "GC090" and option[0].replace("no-", "") in error["message"]
    assert "--memory" in error["hint"]


@pytest.mark.slow
def test_wrong_options_are_said(capsys: pytest.CaptureFixture[str]) -> None:
    for options, text in ((("--methods", "lroa"), "did you mean 'lora'"), (("--optimizer", "adam"), "adamw")):
        outcome = run_here(capsys, "check", "spec.yaml", "-m", BERT, "--memory", "--seq", "8", *options)
        assert outcome.status == 2 and text in outcome.err
