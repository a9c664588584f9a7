"""``graftc pet``: from files to an artifact that other commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from graftc.runtime.cli.results import published_schema
from tests.cli.support import run_here
from tests.pet.small import LORA, SPEC, data, model, tokenizer


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A spec, rows, and a model with its tokenizer."""
    monkeypatch.chdir(tmp_path)
    options = {"steps": 2, "max_length": 24}
    spec = {**SPEC, "training": {**options, "auxiliary": 0}, "members": "bank", "spec": LORA}
    spec["classifier"] = {"training": options}
    (tmp_path / "pet.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    base: Any = model(initializer_range=0.1)
    base.save_pretrained("base")
    tokenizer().save_pretrained("base")
    Path("rows").mkdir()
    rows = data()
    for name, part in (("train", rows.train), ("unlabelled", rows.unlabelled), ("test", rows.test)):
        assert part is not None
        labels = [{"label": ("space", "hockey")[label]} for label in part.labels or ()] or [{}] * len(part)
        lines = [json.dumps({**row, **label}) for row, label in zip(part.rows, labels, strict=True)]
        (Path("rows") / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")


ARGUMENTS = ("pet", "pet.yaml", "--data", "rows", "--model", "base", "--out", "out")


def test_from_files_to_an_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, *ARGUMENTS, "--json")
    assert outcome.status == 0
    assert not list(Draft202012Validator(published_schema("pet")).iter_errors(outcome.data))
    held = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert {key: outcome.data[key] for key in held} == held
    assert outcome.data["rows"] == {"labelled": 6, "unlabelled": 24, "test": 12}
    text = run_here(capsys, *ARGUMENTS)  # it is done, and only read
    assert "pattern-1 #1" in text.out and "classifier" in text.out and text.out.endswith("wrote out/classifier\n")
    assert run_here(capsys, *ARGUMENTS, "--seed", "1").err.startswith("GC058")
    exported = run_here(capsys, "export", "out/classifier", "-f", "onnx", "--out", "classifier.onnx", "--json")
    assert exported.status == 0 and Path("classifier.onnx").is_file()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("--data", "nowhere"), "GC180"),
        (("--out", "rows"), "GC063"),
        (("--tokenizer", "rows"), "GC146"),
        (("--device", "nonsense"), "GC090"),
    ],
)
def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], change: tuple[str, str], code: str) -> None:
    outcome = run_here(capsys, *ARGUMENTS, *change, "--json")
    assert outcome.data["error"]["code"] == code and not Path("out").exists()
