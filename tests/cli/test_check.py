"""``graftc check`` and ``graftc roles`` on tiny models."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoConfig

import graftc
from graftc.testing.families import bert
from tests.cli.support import check_golden, run_apart, run_here

BERT = "graftc.testing.families:bert"
SPEC = """\
version: 1
adapt:
  - name: attention
    method: lora
    target: {role: [attn.q, attn.v]}
    rank: 8
  - name: inner
    method: lora
    target: {role: ffn.down, layers: 0}
    rank: 4
train: [classifier]
"""
ATTENTION = 2 * 2 * 8 * (48 + 48)
INNER = 4 * (48 + 80)
HEAD = 3 * 48 + 3


@pytest.fixture(autouse=True)
def _in_a_folder_with_a_spec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec.yaml").write_text(SPEC, encoding="utf-8")
    monkeypatch.chdir(tmp_path)


@pytest.mark.slow
def test_check_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "check", "spec.yaml", "--model", BERT)
    assert (outcome.status, outcome.err) == (0, "")
    check_golden("check_bert", outcome.out)


@pytest.mark.full
@pytest.mark.parametrize("meta", [False, True])
def test_check_as_json(capsys: pytest.CaptureFixture[str], meta: bool) -> None:
    outcome = run_here(capsys, "check", "spec.yaml", "-m", BERT, "--json", *(["--meta"] if meta else []))
    assert (outcome.status, outcome.err) == (0, "")
    data = outcome.data
    base = sum(p.numel() for p in bert().parameters())
    added = ATTENTION + INNER
    assert data["trainable_parameters"] == data["deployed_parameters"] == added
    assert data["trained_in_full"] == HEAD
    assert data["base_parameters"] == base
    assert data["percent"] == pytest.approx(100 * added / (base + added))
    assert data["class"] == "BertForSequenceClassification" and data["warnings"] == []
    first, second, trained = data["adaptations"]
    assert (first["name"], first["sites"], first["trainable_parameters"]) == ("attention", 4, ATTENTION)
    assert first["bytes"] == 4 * ATTENTION and first["flops_per_token"] == 2 * ATTENTION
    assert (second["name"], second["sites"], second["trainable_parameters"]) == ("inner", 1, INNER)
    assert trained["trainable_parameters"] == HEAD
    assert data["totals"]["trainable_parameters"] == added + HEAD
    assert data["totals"]["sites"] == 4 + 1 + trained["sites"]
    assert min(data["load_seconds"], data["capture_seconds"], data["rewrite_seconds"]) > 0


@pytest.mark.slow
def test_check_is_what_python_gives(capsys: pytest.CaptureFixture[str]) -> None:
    data = run_here(capsys, "check", "spec.yaml", "--model", BERT, "--json").data
    report = graftc.check("spec.yaml", bert()).to_json()
    report["adaptations"] = list(report["adaptations"])
    report["notes"] = list(report["notes"])
    for anchor in (*data["anchors"], *report["anchors"]):
        del anchor["seconds"]
    assert [s["name"] for s in data["steps"]] == [s["name"] for s in report["steps"]]
    for key in report.keys() - {"capture_seconds", "rewrite_seconds", "cached", "steps"}:
        assert data[key] == report[key]


@pytest.mark.full
def test_check_of_a_folder_with_only_a_config(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    config = bert().config
    config.architectures = ["BertForSequenceClassification"]
    config.save_pretrained(tmp_path / "folder")
    outcome = run_here(capsys, "check", "spec.yaml", "--model", "folder", "--meta", "--json")
    assert outcome.status == 0 and outcome.data["trainable_parameters"] == ATTENTION + INNER
    refused = run_here(capsys, "check", "spec.yaml", "--model", "folder")
    assert refused.status == 3
    assert refused.err == (
        "GC032: 'folder' has a config.json but no weights\n  hint: add --meta to work without weights\n"
    )
    assert AutoConfig.from_pretrained(tmp_path / "folder").hidden_size == 48


@pytest.mark.slow
def test_a_warning_stands_beside_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    Path("tied.yaml").write_text("adapt: [{method: lora, target: {modules: lm_head}}]\n", encoding="utf-8")
    outcome = run_here(capsys, "check", "tied.yaml", "--model", "graftc.testing.families:gpt2")
    assert outcome.status == 0 and outcome.out.startswith("tied.yaml fits GPT2LMHeadModel\n")
    check_golden("check_tied_warning", outcome.err)
    data = run_here(capsys, "check", "tied.yaml", "--model", "graftc.testing.families:gpt2", "--json")
    assert data.err == "" and [w["code"] for w in data.data["warnings"]] == ["GC024"]


def test_roles_as_tables(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, "roles", BERT)
    assert (outcome.status, outcome.err) == (0, "")
    check_golden("roles_bert", outcome.out)


@pytest.mark.full
@pytest.mark.parametrize("meta", [False, True])
def test_roles_as_json(capsys: pytest.CaptureFixture[str], meta: bool) -> None:
    outcome = run_here(capsys, "roles", "graftc.testing.families:gpt2", "--json", *(["--meta"] if meta else []))
    assert (outcome.status, outcome.err) == (0, "")
    keys = [f for f in outcome.data["findings"] if f["role"] == "attn.k"]
    assert [(f["layer"], f["rows"], f["parameter"]) for f in keys] == [
        (0, [[48, 96]], "transformer.h.0.attn.c_attn.weight"),
        (1, [[48, 96]], "transformer.h.1.attn.c_attn.weight"),
    ]
    assert all(f["evidence"] for f in outcome.data["findings"]) and outcome.data["unresolved"] == []


@pytest.mark.full
def test_another_process_gives_the_same_text_without_colours(tmp_path: Path) -> None:
    outcome = run_apart("check", "spec.yaml", "--model", BERT, cwd=tmp_path, PYTHONWARNINGS="default")
    assert outcome.status == 0 and "\x1b" not in outcome.out + outcome.err and "loading" not in outcome.err
    check_golden("check_bert", outcome.out)


def test_what_a_model_prints_does_not_spoil_json(capsys: pytest.CaptureFixture[str]) -> None:
    Path("noisy_model.py").write_text(
        "from graftc.testing.families import bert\n\ndef make():\n    print('hello')\n    return bert()\n",
        encoding="utf-8",
    )
    outcome = run_here(capsys, "roles", "noisy_model:make", "--json")
    assert outcome.status == 0 and outcome.data["class"] == "BertForSequenceClassification"
    assert outcome.err == "hello\n"
