"""A merge that is killed at random moments resumes where it stopped, and the result is the same."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import graftc
from graftc.files.writing import recover
from graftc.runtime.loading.verify import verify
from graftc.runtime.streaming import merging
from tests.kit.folders import tree_bytes
from tests.kit.forks import Worker, fork
from tests.kit.users import as_root, give, snapshot
from tests.runtime.streaming.support import PROJECTIONS, sharded_base, written_lora

pytestmark = pytest.mark.slow

KILLS = int(os.environ.get("GRAFTC_KILLS", "3"))
"""How often a merge is killed; ``make gates`` has 20."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resume")
    written_lora(folder / "adapter", sharded_base(folder / "base"))
    (folder / "out").mkdir()
    return folder


@pytest.fixture(scope="module")
def worker(place: Path) -> Iterator[Worker]:
    running = Worker("tests.runtime.streaming.worker", place)
    yield running
    running.process.kill()
    running.process.wait()


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_killed_at_random(place: Path, worker: Worker) -> None:
    out = place / "out" / "merged"
    takes = worker.run("merge")[1]
    expected = tree_bytes(out)
    rng, killed = random.Random(0), 0
    shutil.rmtree(out)
    while killed < KILLS:
        status, _ = worker.run("merge", takes * rng.random())
        assert status in (0, -9), worker.told()
        killed += status == -9
        removed_if_whole(out, expected)
        recover(place / "out")
        removed_if_whole(out, expected)  # if it was killed right before the last rename, recovering does that rename
        left = list((place / "out").iterdir())
        assert len(left) <= 1, "two staging folders"
    assert worker.run("merge")[0] == 0
    assert tree_bytes(out) == expected
    assert [path.name for path in (place / "out").iterdir()] == ["merged"]
    assert verify(out).passed


def removed_if_whole(out: Path, expected: dict[str, bytes]) -> None:
    """Remove a result if there is one, after checking that it is complete."""
    if out.exists():
        assert tree_bytes(out) == expected
        shutil.rmtree(out)


def stopped_after(monkeypatch: pytest.MonkeyPatch, files: int) -> list[str]:
    """Make merging stop after so many files and keep its staging folder; return the names of files that it finishes."""
    begun: list[str] = []
    work = merging._finished

    def counting(plan, shard, *rest):  # type: ignore[no-untyped-def]
        if len(begun) == files:
            os._exit(9)
        begun.append(shard.name)
        return work(plan, shard, *rest)

    monkeypatch.setattr(merging, "_finished", counting)
    return begun


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_done_files_are_not_done_again_unless_they_changed(place: Path, tmp_path: Path) -> None:
    base, adapter, out = place / "base", place / "adapter", tmp_path / "merged"
    graftc.merge_checkpoint(adapter, base, tmp_path / "whole")

    def killed() -> Path:
        child = fork()
        if child == 0:
            with pytest.MonkeyPatch.context() as patch:
                stopped_after(patch, 2)
                graftc.merge_checkpoint(adapter, base, out)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
        (staging,) = tmp_path.glob(".merged.graftc-*")
        return staging

    staging = killed()
    assert len((staging / "journal.jsonl").read_text().splitlines()) == 2
    with pytest.MonkeyPatch.context() as patch:
        begun = stopped_after(patch, 99)
        result = graftc.merge_checkpoint(adapter, base, out)
    shards = [path.name for path in sorted(base.glob("*.safetensors"))]
    assert begun == shards[2:]
    assert result.resumed == 2
    assert result.certificate == graftc.merge_checkpoint(adapter, base).certificate
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")
    shutil.rmtree(out)
    staging = killed()
    first = staging / "new" / "merged" / shards[0]
    first.write_bytes(first.read_bytes()[:-1] + b"\x7f")
    line, other = (staging / "journal.jsonl").read_text().splitlines()
    (staging / "journal.jsonl").write_text(f"{line}\n{other[:-9]}")  # cut off
    with pytest.MonkeyPatch.context() as patch:
        begun = stopped_after(patch, 99)
        graftc.merge_checkpoint(adapter, base, out)
    assert begun == shards
    assert tree_bytes(out) == tree_bytes(tmp_path / "whole")


@pytest.mark.full
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize(
    ("whose", "changed"),
    [
        pytest.param("another", "nothing", marks=as_root),
        pytest.param("another", "folded", marks=as_root),
        *(("own", "folded"), ("own", "untouched"), ("own", "metadata"), ("own", "more"), ("own", "evidence")),
    ],
)
def test_a_planted_folder_is_not_believed(place: Path, tmp_path: Path, whose: str, changed: str) -> None:
    """Planted files are not used, even if their digests match the journal."""
    base, adapter, out = place / "base", place / "adapter", tmp_path / "merged"
    child = fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(patch, 2)
            graftc.merge_checkpoint(adapter, base, out)
        os._exit(0)
    os.waitpid(child, 0)
    (staging,) = tmp_path.glob(".merged.graftc-*")
    plant(staging, changed)
    if whose == "another":
        give(staging)
    before = snapshot(staging)
    result = graftc.merge_checkpoint(adapter, base, out)
    clean = graftc.merge_checkpoint(adapter, base, tmp_path / "clean")
    assert result.resumed == (0 if whose == "another" else 2 if changed == "evidence" else 1)
    assert result.certificate == clean.certificate and tree_bytes(out) == tree_bytes(tmp_path / "clean")
    assert {path.lstat().st_uid for path in (out, *out.rglob("*"))} == {os.geteuid()}
    assert not staging.exists() if whose == "own" else snapshot(staging) == before


def plant(staging: Path, changed: str) -> None:
    """Change one finished file, and record its new digest in the journal."""
    journal = staging / "journal.jsonl"
    lines = [json.loads(line) for line in journal.read_text().splitlines()]
    path = staging / "new" / "merged" / lines[1]["file"]
    with safe_open(path, "pt") as opened:
        stored = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - no mapping
        metadata = opened.metadata()
    folded = [name for name in stored if any(part in name for part in PROJECTIONS)]
    others = [name for name in stored if name not in folded]
    if changed == "folded":
        stored[folded[0]] = torch.full_like(stored[folded[0]], 3.0)
    elif changed == "untouched":
        stored[others[0]] = stored[others[0]] + 1
    elif changed == "more":
        stored["more"] = torch.ones(2)
    elif changed == "metadata":
        metadata = {**(metadata or {}), "planted": "yes"}
    if changed not in ("nothing", "evidence"):
        save_file(stored, path, metadata=metadata)
    lines[1]["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    if changed == "evidence":
        lines[1] |= {"untouched": 1000, "sites": [], "check": "0"}
    journal.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("name", ["generation_config.json", "tokenizer.json", "merges.txt"])
@pytest.mark.parametrize("kind", ["pipe", "device", "sparse"])
def test_files_beside_the_weights_that_never_end_are_refused(place: Path, tmp_path: Path, name: str, kind: str) -> None:
    base = shutil.copytree(place / "base", tmp_path / "base")
    (base / name).unlink(missing_ok=True)
    if kind == "pipe":
        os.mkfifo(base / name)
    elif kind == "device":
        (base / name).symlink_to("/dev/zero")
    else:
        with (base / name).open("wb") as file:
            file.truncate(2**36)
    with pytest.raises(graftc.GraftError) as caught:
        graftc.merge_checkpoint(place / "adapter", base, tmp_path / "merged")
    assert caught.value.code == "GC100" and [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
def test_other_work_for_the_same_place_throws_the_old_away(place: Path, tmp_path: Path) -> None:
    other = written_lora(tmp_path / "other", place / "base", lora_alpha=3)
    child = fork()
    if child == 0:
        with pytest.MonkeyPatch.context() as patch:
            stopped_after(patch, 1)
            graftc.merge_checkpoint(place / "adapter", place / "base", tmp_path / "merged")
        os._exit(0)
    os.waitpid(child, 0)
    assert list(tmp_path.glob(".merged.graftc-*"))
    result = graftc.merge_checkpoint(other, place / "base", tmp_path / "merged")
    assert result.resumed == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["merged", "other"]
    record = json.loads((tmp_path / "merged" / "graftc.json").read_text())
    assert json.loads(record["spec"])["lora_alpha"] == 3
