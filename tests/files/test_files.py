"""A destination is absent or complete, whatever happens at any point of writing it."""

from __future__ import annotations

import functools
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftc.files.destinations import check_destination
from graftc.files.held_folder import HeldFolder
from graftc.files.writing import recover, staged, write_text
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.faults import FAILED, Fault, requests_of, run_with_fault

OLD, NEW = "old", "new"


def write_folder(path: Path, text: str, force: bool = False) -> None:
    with staged(path, force=force, replaceable=Path.is_dir) as folder:
        folder.mkdir()
        (folder / "inner").mkdir()
        for name in ("a", "inner/b", "c"):
            (folder / name).write_text(text)


def write_pair(path: Path, text: str, force: bool = False, data: bool = True) -> None:
    """Write a file, and another beside it that it needs."""
    with staged(path, force=force, companions=(f"{path.name}.data",)) as file:
        file.write_text(text)
        if data:
            file.with_name(f"{file.name}.data").write_text(text)


def folder_state(path: Path) -> str:
    """Return ``absent``, or the text that all files of a complete folder contain."""
    if not os.path.lexists(path):
        return "absent"
    assert sorted(p.relative_to(path).as_posix() for p in path.rglob("*")) == ["a", "c", "inner", "inner/b"]
    (text,) = {p.read_text() for p in path.rglob("*") if p.is_file()}
    return text


def pair_state(path: Path) -> str:
    """Return ``absent``, or the text of a file whose companion, if it needs one, contains the same."""
    if not os.path.lexists(path):
        return "absent"
    text, beside = path.read_text(), path.with_name(f"{path.name}.data")
    if text == "alone":
        return text
    assert beside.read_text() == text, "the file points at a companion that is another's"
    return text


def strays(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if ".graftc-" in p.name]


class Scenario:
    """A write to a destination that is absent or has older contents."""

    def __init__(self, old: Callable[[Path], None] | None, new: Callable[[Path], None], state: Callable[[Path], str]):
        self.old, self.new, self.state = old, new, state

    def start(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.old is not None:
            self.old(folder / "it")
        return folder / "it"


SCENARIOS = {
    "folder": Scenario(None, lambda p: write_folder(p, NEW), folder_state),
    "folder over folder": Scenario(
        lambda p: write_folder(p, OLD), lambda p: write_folder(p, NEW, force=True), folder_state
    ),
    "pair": Scenario(None, lambda p: write_pair(p, NEW), pair_state),
    "pair over pair": Scenario(lambda p: write_pair(p, OLD), lambda p: write_pair(p, NEW, force=True), pair_state),
    "pair over one": Scenario(
        lambda p: write_pair(p, "alone", data=False), lambda p: write_pair(p, NEW, force=True), pair_state
    ),
    "one over pair": Scenario(
        lambda p: write_pair(p, OLD), lambda p: write_pair(p, "alone", force=True, data=False), pair_state
    ),
}


def points() -> Iterator[Any]:
    """Yield every fault in every scenario; killing at each point is quick enough in two scenarios."""
    for fault in ("kill", "enospc"):
        for scenario in SCENARIOS:
            quick = fault == "enospc" or scenario in ("folder over folder", "pair over pair")
            for exchange, name in ((True, "exchange"), (False, "journal")):
                marks = () if quick else pytest.mark.full
                yield pytest.param(fault, scenario, exchange, id=f"{fault}-{scenario}-{name}", marks=marks)


@pytest.mark.slow
@pytest.mark.sample("enospc-folder-exchange", "enospc-pair over one-exchange")
@pytest.mark.parametrize(("fault", "scenario", "exchange"), list(points()))
def test_every_point(
    scenario: str, fault: Fault, exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run killed, or out of space, at any request to the file system leaves a state that recovery completes."""
    if not exchange:  # a file system that cannot swap two names
        monkeypatch.setattr(HeldFolder, "_rename_with", lambda *_: False)
    case, folder = SCENARIOS[scenario], tmp_path / "here"
    path = case.start(folder)
    before = case.state(path)
    count = requests_of(functools.partial(case.new, path), fault)
    after = case.state(path)
    assert count > 4 and after not in ("absent", before)
    endings = set()
    for passing in range(count + 1):
        path = case.start(folder)
        status = run_with_fault(functools.partial(case.new, path), fault, passing)
        left = case.state(path)
        if fault == "enospc":
            # A request that is not needed may fail without harm; any other is an error that leaves all unchanged.
            assert status in (0, FAILED)
            assert left == (after if status == 0 else before)
            assert strays(folder) == []
        else:
            assert status in (0, -9)
            assert left in (before, after, "absent")
            if before != "absent" and exchange and "folder" in scenario:
                assert left != "absent"
        recover(folder)
        assert strays(folder) == []
        assert case.state(path) in (before, after)
        endings.add(case.state(path))
        assert sorted(p.name for p in folder.iterdir() if p.name not in ("it", "it.data")) == []
        if case.state(path) == "absent":
            assert not any(folder.iterdir())
        recovered = case.state(path)
        if recovered == before:
            case.new(path)
            assert case.state(path) == after and strays(folder) == []
    assert endings == {before, after}


def test_a_run_that_lives_is_left_alone(tmp_path: Path) -> None:
    with staged(tmp_path / "first") as file:
        file.write_text(NEW)
        write_text(tmp_path / "second", NEW)
        recover(tmp_path)
        assert len(strays(tmp_path)) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["first", "second"]


def test_permissions_are_those_of_new_files(tmp_path: Path) -> None:
    previous = os.umask(0o027)
    try:
        with staged(tmp_path / "it", replaceable=Path.is_dir) as folder:
            folder.mkdir()
            (folder / "private").touch(mode=0o600)
    finally:
        os.umask(previous)
    assert stat.S_IMODE((tmp_path / "it").stat().st_mode) == 0o750
    assert stat.S_IMODE((tmp_path / "it" / "private").stat().st_mode) == 0o640


def test_parents_are_made_and_not_left_behind(tmp_path: Path) -> None:
    write_text(tmp_path / "a" / "b" / "file", NEW)
    assert (tmp_path / "a" / "b" / "file").read_text() == NEW
    with pytest.raises(ValueError, match="on purpose"), staged(tmp_path / "c" / "d" / "file"):
        raise ValueError("on purpose")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize(
    ("make", "force", "words"),
    [
        (lambda p: p.write_text(OLD), False, "exists"),
        (lambda p: p.mkdir(), False, "it is a folder, and cannot be replaced with a file"),
        (lambda p: p.symlink_to("nowhere"), False, "exists"),
        (lambda p: p.mkdir(), True, "it is a folder, and cannot be replaced with a file"),
        (os.mkfifo, True, "it is a pipe, and cannot be replaced with a file"),
        (lambda p: p.symlink_to("/dev/full"), True, "it is a device, and cannot be replaced with a file"),
    ],
)
def test_what_is_there_is_kept(make: Callable[[Path], object], force: bool, words: str, tmp_path: Path) -> None:
    path = tmp_path / "it"
    make(path)
    with pytest.raises(GraftError, match=words) as caught:
        write_text(path, NEW, force=force)
    assert caught.value.code == "GC063" and [p.name for p in tmp_path.iterdir()] == ["it"]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: p.write_text(OLD), "it is a file, not a folder that graftc wrote"),
        (lambda p: p.mkdir(), "it is a folder that graftc did not write"),
        (os.mkfifo, "it is a pipe, and cannot be replaced with a folder"),
    ],
)
def test_what_is_no_folder_of_ours_is_kept(make: Callable[[Path], object], words: str, tmp_path: Path) -> None:
    make(tmp_path / "it")
    with pytest.raises(GraftError, match=words) as caught:
        check_destination(tmp_path / "it", force=True, replaceable=lambda path: False)
    assert caught.value.code == "GC063" and caught.value.hint


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text(OLD)
    (tmp_path / "link").symlink_to("precious")
    write_text(tmp_path / "link", NEW, force=True)
    assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_text() == NEW
    assert (tmp_path / "precious").read_text() == OLD


def test_somebody_else_was_quicker(tmp_path: Path) -> None:
    """A file that appears at the destination during the writing is not overwritten without ``force``."""
    with pytest.raises(GraftError) as caught, staged(tmp_path / "it") as file:
        file.write_text(NEW)
        (tmp_path / "it").write_text("theirs")
    assert caught.value.code == "GC063" and "created in the meantime" in caught.value.message
    assert (tmp_path / "it").read_text() == "theirs"
    assert strays(tmp_path) == []


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text(OLD)
    with pytest.raises(GraftError) as caught:
        write_text(tmp_path / "file" / "it", NEW)
    assert caught.value.code == "GC064" and caught.value.hint == "part of the path is a file: choose another path"


def test_a_journal_cannot_reach_elsewhere(tmp_path: Path) -> None:
    """A forged staging folder moves nothing out of its parent."""
    (tmp_path / "here").mkdir()
    (tmp_path / "victim").write_text(OLD)
    forged = tmp_path / "here" / ".it.graftc-0123456789ab"
    (forged / "new").mkdir(parents=True)
    (forged / "commit.json").write_text('{"place": {"../victim": 1}, "companions": [], "replace": true}')
    recover(tmp_path / "here")
    assert (tmp_path / "victim").read_text() == OLD and strays(tmp_path / "here") == []
