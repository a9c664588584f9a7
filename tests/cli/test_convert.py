"""``graftc convert``: artifacts to LoRA, adapter folders to other layouts, and refusals."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from graftc.cli.schemas import published_schema
from graftc.testing.families import tiny
from tests.cli.support import run_here
from tests.runtime.interop.adapters import base, written


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base, an artifact with a DoRA and a trained head, and an adapter folder."""
    import graftc
    from graftc.testing import perturb

    folder = tmp_path_factory.mktemp("convert")
    tiny("bert").save_pretrained(folder / "base")
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder / "base")
    dora = {"method": "dora", "rank": 2, "target": {"role": ["attn.q"]}}
    compiled = graftc.compile({"adapt": [dora], "train": ["classifier"]}, model)
    perturb(compiled)
    compiled.save(folder / "artifact", certify=False)
    written(base("llama"), folder / "adapter", target_modules=["q_proj", "v_proj"])
    (folder / "pickled").mkdir()
    (folder / "pickled" / "adapter_config.json").write_bytes((folder / "adapter" / "adapter_config.json").read_bytes())
    (folder / "pickled" / "adapter_model.bin").write_bytes(b"cos\nsystem\n")
    return folder


def run(capsys: pytest.CaptureFixture[str], *words: str, status: int = 0) -> Any:
    outcome = run_here(capsys, "convert", *words, "--json")
    assert outcome.status == status, outcome.err
    data = outcome.data
    Draft202012Validator(published_schema("error" if status else "convert")).validate(data)
    return data


@pytest.mark.full
def test_an_artifact(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new artifact loads; its base with the head is inside."""
    import graftc

    monkeypatch.chdir(here)
    data = run(capsys, "artifact", "--out", "lora", "--into-base", "trained", "--rank", "3")
    assert data["into_base"] == ["trained"] and data["rank"] == 3 and 0.01 < data["largest_error"] < 1
    assert {site["rank"] for site in data["sites"]} == {3} and data["outputs"]["logits"] > 0
    assert any(file["path"].endswith("model.safetensors") for file in data["files"])
    loaded = graftc.load(here / "lora")
    assert [a.method for a in loaded.spec.adapt] == ["lora"] and not loaded.spec.train
    outcome = run_here(capsys, "convert", "artifact", "--dry-run")
    assert outcome.status == 0 and "artifact to lora, 2 sites, rank 48 at most" in outcome.out
    error = run(capsys, "artifact", "--dry-run", "--rank", "2", "--error", "0.01", status=1)["error"]
    assert error["code"] == "GC067" and "is not met at 2 of 2 sites" in error["message"]


@pytest.mark.slow
def test_a_folder(capsys: pytest.CaptureFixture[str], here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(here)
    data = run(capsys, "adapter", "--out", "vllm", "--to", "vllm", "--join", "qkv")
    assert (data["from_form"], data["to_form"], data["rank"]) == ("peft", "vllm", 6)
    assert [file["path"] for file in data["files"]] == ["vllm/adapter_config.json", "vllm/adapter_model.safetensors"]
    assert data["largest_error"] < 1e-12 and data["outputs"] is None
    error = run(capsys, "adapter", "--out", "vllm", status=3)["error"]
    assert error["code"] == "GC063"
    assert run(capsys, "adapter", "--out", "vllm", "--force")["to_form"] == "peft"
    shutil.copytree("adapter", "copied")
    outcome = run_here(capsys, "convert", "adapter", "--dry-run", "--add", "copied")
    assert outcome.status == 0 and "nothing was written" in outcome.out and "rank 6 at most" in outcome.out


@pytest.mark.parametrize(
    ("words", "status", "code", "message"),
    [
        (("adapter", "--dry-run", "--to", "vlm"), 2, "GC069", "no layout 'vlm'"),
        (("adapter", "--dry-run", "--to", "lora"), 2, "GC090", "converted only to another layout"),
        (("adapter", "--dry-run", "--rank", "3"), 2, "GC090", "--rank does not apply to an adapter folder"),
        (("adapter", "--dry-run", "--join", "all"), 2, "GC069", "nothing is fused as 'all'"),
        (("adapter", "--dry-run", "--to", "torchtune"), 2, "GC069", "depends on the heads"),
        (("adapter", "--dry-run", "--add", "base"), 3, "GC110", "has no adapter_config.json"),
        (("adapter", "--dry-run", "--add", "base/../adapter"), 2, "GC073", "are one folder"),
        (("adapter", "--dry-run", "--add", "vllm", "--add", "vllm"), 2, "GC073", "vllm is named twice"),
        (("adapter", "--out", "adapter/x"), 3, "GC063", "adapter/x overlaps adapter"),
        (("adapter", "--out", "base/x", "--model", "base"), 3, "GC063", "base/x overlaps base"),
        (("adapter", "--out", "adapter/x", "--to", "gguf", "--model", "base"), 3, "GC063", "overlaps adapter"),
        (("adapter", "--out", "base/x", "--onto", "base"), 3, "GC063", "base/x overlaps base"),
        (("artifact", "--dry-run", "--split", "qkv"), 2, "GC090", "--split does not apply to an artifact"),
        (("artifact", "--dry-run", "--to", "vllm"), 2, "GC090", "cannot be converted to 'vllm'"),
        (("artifact", "--dry-run", "--names", "lora"), 2, "GC091", "no adaptation 'lora'"),
        (("pickled", "--dry-run"), 3, "GC110", "has no adapter_model.safetensors"),
        (("nowhere", "--dry-run"), 3, "GC080", "nowhere"),
        (("adapter",), 2, "GC090", "--out"),
    ],
)
def test_what_is_refused(
    words: tuple[str, ...],
    status: int,
    code: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
    here: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(here)
    before = {path: path.stat().st_mtime_ns for path in here.rglob("*")}
    error = run(capsys, *words, status=status)["error"]
    assert error["code"] == code and message in error["message"] and error["hint"]
    assert before == {path: path.stat().st_mtime_ns for path in here.rglob("*")}
