"""Files and folders that others have put where graftc works are never taken over, followed or removed."""

from __future__ import annotations

import json
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from graftc.applications.recipes.folder import make_folder
from graftc.files.destinations import check_folder
from graftc.files.held_folder import HeldFolder
from graftc.files.writing import check_apart, check_destination, recover, staged, write_text
from graftc.specs.errors.diagnostics import GraftError
from tests.kit.users import OTHER, as_root, give, snapshot

WORK = "ab" * 32
STAGING = f".it.graftc-{WORK[:12]}"
SECONDS = 2.0


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder that every user may write to, beside one that must not be touched."""
    (tmp_path / "victim" / "inner").mkdir(parents=True)
    for name in ("precious", "inner/precious", "it"):
        (tmp_path / "victim" / name).write_text("precious")
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o1777)
    return folder


def planted(shared: Path, mode: int = 0o700) -> Path:
    """Create a staging folder of the work to be done, with a result in it."""
    staging = shared / STAGING
    (staging / "new" / "it").mkdir(parents=True)
    (staging / "new" / "it" / "data").write_text("planted")
    (staging / "resume.json").write_text(json.dumps({"work": WORK}))
    (staging / "journal.jsonl").write_text("planted")
    staging.chmod(mode)
    return staging


def of_another(shared: Path) -> None:
    give(planted(shared))


def inner_of_another(shared: Path) -> None:
    give(planted(shared) / "new" / "it" / "data")


def folder_of_another(shared: Path) -> None:
    give(planted(shared) / "new")


def open_to_group(shared: Path) -> None:
    planted(shared, 0o770)


def open_to_all(shared: Path) -> None:
    planted(shared, 0o1777)


def inner_open_to_all(shared: Path) -> None:
    staging = planted(shared, 0o755)
    (staging / "new" / "it").chmod(0o777)


def link_to_victim(shared: Path) -> None:
    (shared / STAGING).symlink_to(shared.parent / "victim")


def link_to_own(shared: Path) -> None:
    planted(shared).rename(shared / "moved")
    (shared / STAGING).symlink_to("moved")


def link_for_new(shared: Path) -> None:
    staging = planted(shared)
    (staging / "new").rename(staging / "moved")
    (staging / "new").symlink_to(shared.parent / "victim")


def link_for_result(shared: Path) -> None:
    staging = planted(shared)
    (staging / "new" / "it").rename(staging / "moved")
    (staging / "new" / "it").symlink_to(shared.parent / "victim")


def link_for_file(shared: Path) -> None:
    (planted(shared) / "new" / "it" / "more").symlink_to(shared.parent / "victim" / "precious")


def hard_link(shared: Path) -> None:
    os.link(shared.parent / "victim" / "precious", planted(shared) / "new" / "it" / "more")


def link_for_note(shared: Path) -> None:
    staging = planted(shared)
    (staging / "resume.json").unlink()
    (staging / "resume.json").symlink_to(shared.parent / "victim" / "made")


def pipe_inside(shared: Path) -> None:
    os.mkfifo(planted(shared) / "new" / "it" / "pipe")


def pipe_for_folder(shared: Path) -> None:
    os.mkfifo(shared / STAGING)


def file_for_folder(shared: Path) -> None:
    (shared / STAGING).write_text("a file")


def socket_for_folder(shared: Path) -> None:
    previous = os.getcwd()
    os.chdir(shared)
    try:
        with socket.socket(socket.AF_UNIX) as sock:
            sock.bind(STAGING)
    finally:
        os.chdir(previous)


def deep(shared: Path) -> None:
    inner = planted(shared) / "new" / "it"
    for _ in range(200):
        inner = inner / "d"
        inner.mkdir()


OTHERS = [of_another, inner_of_another, folder_of_another]
OWN = [
    *(open_to_group, open_to_all, inner_open_to_all, link_to_victim, link_to_own, link_for_new, link_for_result),
    *(link_for_file, hard_link, link_for_note, pipe_inside, pipe_for_folder, file_for_folder, socket_for_folder, deep),
]
PLANTED = [pytest.param(plant, marks=as_root, id=plant.__name__) for plant in OTHERS] + [
    pytest.param(plant, id=plant.__name__) for plant in OWN
]


def kept(shared: Path) -> dict[str, object]:
    """Return a snapshot of the folder that has to be unchanged afterwards."""
    victim = snapshot(shared.parent / "victim")
    return {f"victim/{name}": state for name, state in victim.items()}


@pytest.fixture
def in_time() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < SECONDS


@pytest.mark.usefixtures("in_time")
class TestPlanted:
    @pytest.mark.parametrize("plant", PLANTED)
    def test_work_is_done_again(self, shared: Path, plant: Callable[[Path], None]) -> None:
        """The result is what this run writes, and it belongs to the user who writes it."""
        plant(shared)
        before, foreign = kept(shared), plant in OTHERS
        there = snapshot(shared)
        with staged(shared / "it", resume=WORK) as folder:
            assert folder.parent.parent.stat().st_uid == os.geteuid() and not folder.parent.is_symlink()
            assert not folder.exists() and not (folder.parent.parent / "journal.jsonl").exists()
            folder.mkdir()
            (folder / "data").write_text("made")
        assert {p.name: p.read_text() for p in (shared / "it").iterdir()} == {"data": "made"}
        assert {path.lstat().st_uid for path in (shared / "it", shared / "it" / "data")} == {os.geteuid()}
        assert kept(shared) == before
        if foreign:
            after = snapshot(shared)
            assert {name: after.get(name) for name in there if name.startswith(STAGING)} == {
                name: state for name, state in there.items() if name.startswith(STAGING)
            }

    @pytest.mark.parametrize("plant", PLANTED)
    def test_other_writes_leave_it_or_remove_it(self, shared: Path, plant: Callable[[Path], None]) -> None:
        plant(shared)
        before, there = kept(shared), snapshot(shared)
        recover(shared)
        write_text(shared / "other", "text")
        write_text(shared / "it", "text")
        assert (shared / "it").read_text() == "text" and kept(shared) == before
        if plant in OTHERS:
            after = snapshot(shared)
            assert all(after.get(name) == state for name, state in there.items() if name.startswith(STAGING))

    def test_work_of_ones_own_goes_on(self, shared: Path) -> None:
        planted(shared)
        with staged(shared / "it", resume=WORK) as folder:
            assert (folder / "data").read_text() == "planted"
        assert [path.name for path in shared.iterdir()] == ["it"]

    @pytest.mark.parametrize("left", ["commit.json.draft", "old", "more"])
    def test_what_a_killed_commit_left_is_in_nobodys_way(self, shared: Path, left: str) -> None:
        staging = planted(shared)
        (staging / left).mkdir() if left == "old" else (staging / left).write_text("{")
        with staged(shared / "it", resume=WORK) as folder:
            assert (folder / "data").read_text() == "planted"
        assert [path.name for path in shared.iterdir()] == ["it"]

    def test_a_swap_while_it_is_written(self, shared: Path) -> None:
        """The staging folder is moved away and replaced by a link."""
        before = kept(shared)
        with pytest.raises(GraftError) as caught, staged(shared / "it") as file:
            file.write_text("text")
            file.parent.parent.rename(shared / "away")
            file.parent.parent.symlink_to(shared.parent / "victim")
        assert caught.value.code == "GC064" and kept(shared) == before and not (shared / "it").exists()

    @pytest.mark.parametrize("resume", [None, WORK])
    def test_a_failing_note_leaves_nothing(
        self, shared: Path, resume: str | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(HeldFolder, "write", full)
        with pytest.raises(GraftError) as caught, staged(shared / "it", resume=resume) as file:
            file.write_text("text")
        assert caught.value.code == "GC064" and list(shared.iterdir()) == []


def _pipe(path: Path) -> None:
    os.mkfifo(path)


def _linked_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def _text(text: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(text)


def _journal(**data: object) -> Callable[[Path], object]:
    return _text(json.dumps({"folder": 1, "place": {"it": 1}, "companions": [], "replace": True} | data))


def _named(path: Path, **data: object) -> None:
    """Write a journal with the right inodes."""
    staging = path.parent
    right = {"folder": staging.stat().st_ino, "place": {"it": (staging / "new" / "it").stat().st_ino}}
    path.write_text(json.dumps({**right, "companions": [], "replace": True, **data}))


JOURNALS: dict[str, Callable[[Path], object]] = {
    "empty place": _journal(place={}),
    "no place": _journal(place=None),
    "place is a list": _journal(place=["it"]),
    "place has texts": _journal(place={"it": "1"}),
    "place leads out": _journal(place={"../victim": 1}),
    "place has a NUL": _journal(place={"a\0b": 1}),
    "companions are numbers": _journal(companions=[1, 2]),
    "companions lead out": _journal(companions=["../../victim/precious"]),
    "replace is a text": _journal(replace="yes"),
    "folder is missing": _journal(folder=None),
    "another folder's": lambda path: _named(path, folder=1),
    "of other names": lambda path: _named(path, place={"data": 1}, companions=["precious"]),
    "a list": _text("[]"),
    "a number": _text("1"),
    "nothing": _text(""),
    "deep": _text("[" * 100_000),
    "deep objects": _text('{"a":' * 100_000),
    "NaN": _text('{"place": NaN}'),
    "huge numbers": _text('{"place": {"it": 1' + "0" * 5000 + "}}"),
    "not text": lambda path: path.write_bytes(b"\xff\xfe\x00"),
    "a pipe": _pipe,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a folder": Path.mkdir,
    "a link": lambda path: path.symlink_to("/etc/passwd"),
    "a link to a pipe": _linked_pipe,
    "sparse": _sparse,
}


@pytest.mark.usefixtures("in_time")
class TestJournals:
    @pytest.mark.parametrize("file", ["commit.json", "resume.json"])
    @pytest.mark.parametrize("journal", JOURNALS)
    def test_one_from_an_archive_blocks_nothing(self, shared: Path, journal: str, file: str) -> None:
        staging = shared / ".it.graftc-aaaaaaaaaaaa"
        (staging / "new").mkdir(parents=True)
        (staging / "new" / "it").write_text("planted")
        (shared / "precious").write_text("precious")
        JOURNALS[journal](staging / file)
        before = kept(shared)
        recover(shared)
        write_text(shared / "other", "text")
        write_text(shared / "it", "text", force=True)
        assert (shared / "it").read_text() == "text" and (shared / "precious").read_text() == "precious"
        assert kept(shared) == before

    def test_a_copy_of_a_true_one_is_none(self, shared: Path) -> None:
        """Inodes bind a journal to its folder: one that was copied, as from an archive, puts nothing in place."""
        staging = shared / ".it.graftc-aaaaaaaaaaaa"
        (staging / "new").mkdir(parents=True)
        (staging / "new" / "it").write_text("planted")
        _named(staging / "commit.json", folder=staging.stat().st_ino + 1)
        (shared / "it").write_text("precious")
        recover(shared)
        assert (shared / "it").read_text() == "precious" and not staging.exists()

    def test_a_true_one_is_finished(self, shared: Path) -> None:
        staging = shared / ".it.graftc-aaaaaaaaaaaa"
        (staging / "new").mkdir(parents=True)
        (staging / "new" / "it").write_text("new")
        (shared / "it").write_text("old")
        _named(staging / "commit.json")
        recover(shared)
        assert (shared / "it").read_text() == "new" and not staging.exists()


@as_root
class TestReplaced:
    @pytest.mark.parametrize("whose", ["it", "it/a", "it/a/b"])
    @pytest.mark.parametrize("early", [False, True])
    def test_a_folder_of_another_user_is_never_replaced(self, shared: Path, whose: str, early: bool) -> None:
        path = shared / "it"
        (path / "a" / "b").mkdir(parents=True)
        (path / "a" / "b" / "file").write_text("theirs")
        os.chown(shared / whose, OTHER, OTHER)
        before = snapshot(path)

        def write() -> None:
            with staged(path, force=True, replaceable=Path.is_dir) as folder:
                folder.mkdir()

        with pytest.raises(GraftError, match="belongs to another user") as caught:
            check_destination(path, force=True, replaceable=Path.is_dir) if early else write()
        assert caught.value.code == "GC063" and snapshot(path) == before

    def test_a_folder_that_changed_hands_meanwhile_is_not_removed(self, shared: Path) -> None:
        path = shared / "it"
        (path / "a").mkdir(parents=True)
        (path / "a" / "file").write_text("theirs")
        with staged(path, force=True, replaceable=Path.is_dir) as folder:
            folder.mkdir()
            give(path)
        assert [file.read_text() for file in shared.rglob("file")] == ["theirs"]

    def test_links_in_what_is_replaced_are_not_followed(self, shared: Path) -> None:
        path, before = shared / "it", kept(shared)
        path.mkdir()
        (path / "link").symlink_to(shared.parent / "victim")
        (path / "file").symlink_to(shared.parent / "victim" / "precious")
        with staged(path, force=True, replaceable=Path.is_dir) as folder:
            folder.mkdir()
        assert kept(shared) == before and list(path.iterdir()) == []

    def test_files_of_another_user_are_read(self, shared: Path) -> None:
        """Permission to read is enough."""
        (shared / "in").write_text("text")
        give(shared / "in")
        check_apart(shared / "it", shared / "in")
        write_text(shared / "it", (shared / "in").read_text())
        assert stat.S_IMODE((shared / "it").stat().st_mode) & 0o600 == 0o600


PATHS = {
    "NUL": "a\0b",
    "NUL above": "a\0b/c",
    "half a character": "a\ud800b",
    "other half": "a\udfffb",
    "long": "x" * 256,
    "long in bytes": "é" * 128,
    "long above": "x" * 300 + "/it",
}
CHECKS: dict[str, Callable[[Path], object]] = {
    "staged": lambda path: write_text(path, "text"),
    "forced": lambda path: write_text(path, "text", force=True),
    "check_destination": check_destination,
    "check_apart": check_apart,
    "check_folder": lambda path: check_folder(path, "mark"),
    "make_folder": make_folder,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("path", PATHS)
def test_paths_that_nothing_can_have(tmp_path: Path, path: str, check: str) -> None:
    with pytest.raises(GraftError) as caught:
        CHECKS[check](tmp_path / PATHS[path])
    assert caught.value.code == "GC064" and len(str(caught.value)) < 1000 and "\0" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["x" * 200, "é" * 100, "a b", "a\nb", os.fsdecode(b"a\xffb")])
def test_unusual_paths(tmp_path: Path, name: str) -> None:
    write_text(tmp_path / name, "text")
    assert (tmp_path / name).read_text() == "text"
