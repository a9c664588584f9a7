"""``graftc pet``: from files to an artifact that other commands accept."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import onnx
import pytest
import yaml
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer

from graftc.applications.recipes.folder import RECIPE
from graftc.cli.schemas import published_schema
from graftc.files.writing import check_folder
from graftc.passes.core import progress
from graftc.specs.errors.diagnostics import GraftError
from tests.applications.pet.small import LORA, SPEC, data, model, tokenizer
from tests.cli.support import run_here


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write a spec, rows, and a model with its tokenizer into the working directory."""
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


@pytest.mark.full
def test_from_files_to_an_artifact(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys, *ARGUMENTS, "--json")
    assert outcome.status == 0
    assert not list(Draft202012Validator(published_schema("pet")).iter_errors(outcome.data))
    results = json.loads(Path("out/results.json").read_text(encoding="utf-8"))
    assert {key: outcome.data[key] for key in results} == results
    assert outcome.data["rows"] == {"labelled": 6, "unlabelled": 24, "test": 12}
    text = run_here(capsys, *ARGUMENTS)  # the run is finished, so its results are only read
    assert "pattern-1 #1" in text.out and "classifier" in text.out and "wrote out/classifier\n" in text.out
    assert text.out.endswith("its tokenizer: out/tokenizer\n")
    assert outcome.data["tokenizer"] == "out/tokenizer" and outcome.err == ""
    assert text.err.startswith("rows: 6 labelled, 24 unlabelled, 12 test\n")
    saved: Any = AutoTokenizer.from_pretrained("out/tokenizer")
    assert saved.get_vocab() == tokenizer().get_vocab()
    assert "\nGC058" in run_here(capsys, *ARGUMENTS, "--seed", "1").err
    Path("out/tokenizer/tokenizer.json").write_text("{}", encoding="utf-8")
    whole = Path("out/results.json").read_bytes()
    Path("out/results.json").write_bytes(whole + b" ")
    assert "\nGC082: out/results.json is damaged" in run_here(capsys, *ARGUMENTS).err
    Path("out/results.json").unlink()
    assert run_here(capsys, *ARGUMENTS).status == 0 and Path("out/results.json").read_bytes() == whole
    saved = AutoTokenizer.from_pretrained("out/tokenizer")  # the damaged tokenizer is written again
    assert saved.get_vocab() == tokenizer().get_vocab()
    exported = run_here(capsys, "export", "out/classifier", "-f", "onnx", "--out", "classifier.onnx", "--json")
    assert exported.status == 0
    metadata = {entry.key: entry.value for entry in onnx.load("classifier.onnx").metadata_props}
    assert json.loads(metadata["graftc.labels"]) == ["hockey", "space"]  # in the order of pet.yaml
    assert run_here(capsys, "merge", "out/classifier", "--out", "merged").status == 0
    beside: Any = AutoTokenizer.from_pretrained("merged")
    assert beside.get_vocab() == saved.get_vocab()


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (("--data", "nowhere"), "GC180"),
        (("--out", "rows"), "GC063"),
        (("--tokenizer", "rows"), "GC146"),
        (("--device", "nonsense"), "GC090"),
        (("--device", "meta"), "GC090"),
        (("--out", "base/config.json"), "GC063"),
        (("--out", "file"), "GC063"),
        (("--out", "link"), "GC063"),
        (("--out", "other"), "GC063"),
        (("--out", "file/out"), "GC064"),
        (("--out", "o" * 300), "GC064"),
        (("--out", "new/" + "o" * 300), "GC064"),
    ],
)
def test_what_is_wrong_is_said(capsys: pytest.CaptureFixture[str], change: tuple[str, str], code: str) -> None:
    Path("file").write_text("mine", encoding="utf-8")
    Path("link").symlink_to("gone")
    Path("other").mkdir()
    Path("other/notes").touch()
    before = sorted(Path().rglob("*"))
    outcome = run_here(capsys, *ARGUMENTS, *change, "--json")
    assert outcome.data["error"]["code"] == code and sorted(Path().rglob("*")) == before


def test_a_run_goes_on_in_an_empty_folder_and_where_it_was_killed(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    check_folder(tmp_path / "run", RECIPE)
    (tmp_path / "run" / f".{RECIPE}.graftc-0123456789ab").mkdir()
    check_folder(tmp_path / "run", RECIPE)
    (tmp_path / "run" / RECIPE).touch()
    (tmp_path / "run" / "notes").touch()
    check_folder(tmp_path / "run", RECIPE)
    check_folder(tmp_path / "new" / "run", RECIPE)
    assert not (tmp_path / "new").exists()


def test_who_interrupts_it_is_told_how_to_go_on(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupting(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graftc.applications.pet.recipe.pet", interrupting)
    outcome = run_here(capsys, *ARGUMENTS)
    assert outcome.status == 130 and "Traceback" not in outcome.err
    assert "interrupted: run the same command again to resume\n" in outcome.err


@pytest.mark.slow
def test_each_training_is_a_line_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def training(*_: Any, **__: Any) -> None:
        with progress.working("PET of", "BERT"):
            for at in (
                "member 1 of 2: step 1 of 9",
                "member 1 of 2: step 9 of 9",
                "verify",
                "member 2 of 2: step 1 of 9",
            ):
                progress.step(at)
                time.sleep(0.1)
        raise GraftError("GC182", "enough")

    monkeypatch.setattr(progress, "AFTER", 0.02)
    monkeypatch.setattr(progress, "EVERY", 0.02)
    monkeypatch.setattr("graftc.applications.pet.recipe.pet", training)
    lines = run_here(capsys, *ARGUMENTS).err.splitlines()
    said = ["rows: 6 labelled, 24 unlabelled, 12 test", "member 1 of 2, after 0 s", "member 2 of 2, after 0 s"]
    assert lines[:3] == said and lines[3].startswith("GC182")
