"""``graftc merge --stream``, ``graftc merge`` of a peft folder, and ``graftc verify --adapter``."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from graftc.cli.output import throughput
from graftc.testing import perturb
from tests.cli.support import run_here, run_valid
from tests.kit.folders import adapted_folder
from tests.runtime.streaming.support import sharded_base, tensors, written_lora

pytestmark = pytest.mark.slow

SPEC = {"adapt": [{"name": "a", "method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}]}


@pytest.fixture(scope="module")
def models_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stream")
    base = sharded_base(folder / "base")
    written_lora(folder / "peft", base)
    compiled = adapted_folder(base, SPEC)
    perturb(compiled)
    compiled.save(folder / "artifact")
    return folder


@pytest.fixture(autouse=True)
def here(models_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for path in models_folder.iterdir():
        shutil.copytree(path, tmp_path / path.name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.full
@pytest.mark.parametrize("adapter", [("artifact", "--stream"), ("peft", "--model", "base")], ids=["artifact", "peft"])
def test_merge_and_verify(capsys: pytest.CaptureFixture[str], here: Path, adapter: tuple[str, ...]) -> None:
    data = run_valid(capsys, "merge", *adapter, "--out", "merged")
    assert data["certificate"]["passed"] is True
    assert data["certificate"]["outputs"] == {}
    merged, base = tensors(here / "merged"), tensors(here / "base")
    changed = [name for name in base if (merged[name] != base[name]).any()]
    assert len(changed) == len(data["certificate"]["sites"]) > 0
    assert data["streamed"] == {"untouched_tensors": len(base) - len(changed), "resumed_files": 0}
    assert {file["path"] for file in data["files"]} == {p.as_posix() for p in Path("merged").iterdir()}
    verified = run_valid(capsys, "verify", "merged", "--adapter", adapter[0], "--base", "base")
    assert [check["name"] for check in verified["checks"]] == [
        *("files", "spec", "certificate", "sources", "tensors", "folded", "untouched")
    ]
    assert run_valid(capsys, "merge", *adapter, "--out", "merged", status=3)["error"]["code"] == "GC063"


@pytest.mark.full
def test_text_and_a_wider_type(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    outcome = run_here(capsys, "merge", "peft", "--model", "base", "--dtype", "float32", "--out", "wide")
    assert outcome.status == 0
    assert "certificate:          passed: 6 sites within" in outcome.out
    assert "untouched:            15 tensors, bit for bit" in outcome.out
    assert {str(tensor.dtype) for tensor in tensors(here / "wide").values()} == {"torch.float32"}


def test_what_does_not_go_together(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    for option in (["--partial"], ["--budget", "1"], ["--base", "full"]):
        error = run_valid(capsys, "merge", "artifact", "--stream", *option, "--dry-run", status=2)["error"]
        assert error["code"] == "GC090" and option[0] in error["message"]
    (here / "peft" / "adapter_config.json").write_text('{"peft_type": "LORA", "base_model_name_or_path": "gone"}')
    assert run_valid(capsys, "merge", "peft", "--dry-run", status=3)["error"]["code"] == "GC086"
    assert run_valid(capsys, "merge", "peft", "--model", "nowhere", "--dry-run", status=3)["error"]["code"] == "GC100"


def test_options_that_verifying_does_not_need(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    """None is ignored. A merged folder is compared with a base only through an adapter."""
    (here / "merged").mkdir()
    (here / "merged" / "graftc.json").write_text("{}")
    for folder, *options in (
        ("artifact", "--files-only", "--adapter", "peft"),
        ("artifact", "--files-only", "--model", "base"),
        ("merged", "--model", "base"),
    ):
        error = run_valid(capsys, "verify", folder, *options, status=2)["error"]
        assert error["code"] == "GC090" and options[-2] in error["message"]


def test_verifying_says_no(capsys: pytest.CaptureFixture[str], here: Path) -> None:
    data = run_valid(capsys, "verify", "base", "--adapter", "peft", "--base", "base", status=1)
    assert data["passed"] is False
    assert [check["passed"] for check in data["checks"]] == [True, False, None]


def test_bytes_a_second_and_the_time_left_are_shown() -> None:
    now = [0.0]
    shown: list[str] = []
    advance = throughput(shown.append, "merging", clock=lambda: now[0])
    for seconds, done in [(0.0, 1e9), (1.0, 1.2e9), (4.0, 2e9), (4.2, 2.1e9), (6.0, 3e9), (9.0, 4e9)]:
        now[0] = seconds
        advance(int(done), 4 * 10**9)
    assert shown == [
        "merging",
        "merging, 2.0 of 4.0 GB, 250 MB/s, 8 s left",
        "merging, 3.0 of 4.0 GB, 333 MB/s, 3 s left",
    ]
