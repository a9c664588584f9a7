"""The file into which rows are folded: everything else is copied, however the system copies, and space is reserved."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.files.tensors.folder import TensorFolder
from graftc.runtime.streaming import new_file
from graftc.runtime.streaming.adapters import read_updates
from graftc.runtime.streaming.merge_plan import MergePlan, make_plan
from graftc.runtime.streaming.new_file import create_file
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.folders import tree_bytes
from tests.runtime.streaming.support import sharded_base, written_lora

needs_reserving = pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve space")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("new-file")
    written_lora(folder / "adapter", sharded_base(folder / "base"))
    return folder


def plan_of(place: Path) -> MergePlan:
    base, updates = read_updates(place / "adapter", None)
    checkpoint = TensorFolder(base)
    return make_plan(checkpoint, updates(checkpoint))


def fails_with(number: int) -> Any:
    def copy(*args: Any, **kwargs: Any) -> int:
        raise OSError(number, os.strerror(number))

    return copy


def some_of(real: Any) -> Any:
    """Return a copy that does less than it is asked for."""
    return lambda source, target, count, **offsets: real(source, target, min(count, 1000), **offsets)


@needs_reserving
@pytest.mark.parametrize("way", ["kernel", "in parts", "elsewhere", "nothing", "missing"])
def test_all_but_folded_tensors_are_copied(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    ways: dict[str, Any] = {
        "in parts": some_of(getattr(os, "copy_file_range", None)),
        "elsewhere": fails_with(errno.EXDEV),
        "nothing": lambda *args, **kwargs: 0,
    }
    if way in ways:
        monkeypatch.setattr(os, "copy_file_range", ways[way], raising=False)
    elif way == "missing":
        monkeypatch.delattr(os, "copy_file_range", raising=False)
    plan = plan_of(place)
    folded = {site.weight.tensor for site in plan.sites}
    seen = 0
    for shard in plan.checkpoint.shards:
        path = tmp_path / shard.name
        create_file(plan, shard, path)
        content, base = path.read_bytes(), shard.path.read_bytes()
        assert len(content) == len(base)
        written = TensorFolder(path)
        assert written.entries.keys() == shard.tensors.keys()
        for name, stored in shard.tensors.items():
            same = content[stored.start : stored.end] == base[stored.start : stored.end]
            assert same == (name not in folded), name
            seen += name in folded
    assert seen == len(folded) > 0


@needs_reserving
@pytest.mark.parametrize("call", ["posix_fallocate", "copy_file_range"])
def test_a_full_disk_is_an_error(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    """It is noticed before anything is written into mapped memory, and no folder is left."""
    monkeypatch.setattr(os, call, fails_with(errno.ENOSPC))
    with pytest.raises(GraftError, match=r"GC064: .*No space left"):
        graftc.merge_checkpoint(place / "adapter", place / "base", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("other", ["one thread", "no reserving"])
def test_files_are_the_same_in_every_way(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    """Files and certificates, whether sites are folded one by one or at the same time, into copies or new files."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        result = graftc.merge_checkpoint(place / "adapter", place / "base", tmp_path / "a")
        assert torch.get_num_threads() == 3
        if other == "one thread":
            torch.set_num_threads(1)
        else:
            monkeypatch.delattr(os, "posix_fallocate", raising=False)
        again = graftc.merge_checkpoint(place / "adapter", place / "base", tmp_path / "b")
    finally:
        torch.set_num_threads(threads)
    assert result.certificate == again.certificate
    assert tree_bytes(tmp_path / "a") == tree_bytes(tmp_path / "b")


def test_the_file_may_end_early(tmp_path: Path) -> None:
    """A base that is cut while it is copied is an error."""
    (tmp_path / "source").write_bytes(b"short")
    source, copy = tmp_path / "source", tmp_path / "copy"
    with source.open("rb") as read, copy.open("wb") as file, pytest.raises(OSError, match="ends early"):
        new_file._copy(read, file, 0, 10)
