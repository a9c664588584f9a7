"""Thousands of staging folders planted by somebody else in a folder of two users, and writes next to them.

A write is right or refused with a code; whatever belongs to others and whatever links lead to stays unchanged,
including the time of its last change; nothing hangs. ``make fuzz`` runs ``FUZZ`` of them, 3,000 at most; the ordinary
tests run a sample.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import stat
import tempfile
import time
import unittest
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from graftc.files.writing import recover, staged, write_text
from graftc.runtime.streaming.journal import Journal
from graftc.specs.errors.diagnostics import GraftError
from tests.gates.mutate import change, flip
from tests.kit.forks import fork
from tests.kit.users import OTHER, as_root

COUNT = min(3000, int(os.environ.get("GRAFTC_FUZZ", "3000")))
SAMPLE = 100
SECONDS = 2.0
WORK = "ab" * 32
NAMES = (f".it.graftc-{WORK[:12]}", ".it.graftc-0123456789ab", ".other.graftc-0123456789ab", ".it.graftc-nothex")
USER = 12345

State = dict[str, tuple[Any, ...]]


def state(path: Path) -> State:
    """Return everything that can be observed of a path and what is below it, except access times."""
    states: State = {}
    for each in [path, *sorted(path.rglob("*"))]:
        seen = each.lstat()
        content = os.readlink(each) if each.is_symlink() else _bytes(each, seen)
        states[str(each)] = (seen.st_ino, seen.st_mode, seen.st_uid, seen.st_mtime_ns, seen.st_ctime_ns, content)
    return states


def _bytes(path: Path, seen: os.stat_result) -> bytes:
    return path.read_bytes() if stat.S_ISREG(seen.st_mode) and seen.st_size < 2**20 else b""


class Planted:
    """A shared folder with a planted staging folder in it, generated deterministically from a number."""

    def __init__(self, place: Path, number: int) -> None:
        self.rng = random.Random(number)
        shutil.rmtree(place, ignore_errors=True)
        self.victim, self.shared = place / "victim", place / "shared"
        (self.victim / "new" / "it").mkdir(parents=True)
        for name in ("precious", "new/it/precious", "commit.json", "resume.json"):
            (self.victim / name).write_text("precious")
        self.shared.mkdir()
        self.shared.chmod(self.rng.choice((0o755, 0o1777, 0o777, 0o2775)))
        self.destination = self.rng.choice(("nothing", "nothing", "file", "own", "foreign", "inner", "link"))
        self._destination(self.shared / "it")
        self.wild = self.rng.random() < 0.65
        self.staging = self.shared / (self.rng.choice(NAMES) if self.wild else NAMES[0])
        self._top()
        self.foreign = self._foreign()

    def _destination(self, path: Path) -> None:
        if self.destination == "file":
            path.write_text("old")
        elif self.destination == "link":
            path.symlink_to(self.victim)
        elif self.destination != "nothing":
            (path / "inner").mkdir(parents=True)
            (path / "inner" / "old").write_text("old")
            if self.destination in ("foreign", "inner"):
                given = path if self.destination == "foreign" else path / "inner"
                os.chown(given, OTHER, OTHER)

    def _top(self) -> None:
        kind = self._kind("folder", "link", "link inside", "pipe", "file", "broken")
        if kind == "folder":
            self._folder(self.staging)
        elif kind == "link":
            self.staging.symlink_to(self.victim)
        elif kind == "link inside":
            self._folder(self.shared / "moved")
            self.staging.symlink_to("moved")
        elif kind == "pipe":
            os.mkfifo(self.staging)
        elif kind == "file":
            self.staging.write_text("a file")
        else:
            self.staging.symlink_to("nowhere")

    def _kind(self, usual: str, *others: str) -> str:
        """Return the kind of entry to create, mostly the usual one."""
        return self.rng.choice((usual,) * 8 + others) if self.wild else usual

    def _folder(self, staging: Path) -> None:
        staging.mkdir()
        self._inner(staging / "new", lambda path: self._folder_of_new(path))
        for name in ("old", "more"):
            if self.rng.random() < 0.15:
                self._inner(staging / name, lambda path: self._folder_of_new(path))
        self._file(staging / "commit.json", self._journal(staging), 0.6 if self.wild else 0.25)
        self._file(staging / "resume.json", json.dumps({"work": WORK}), 0.5)
        line = json.dumps({"file": "data", "sha256": "0" * 64, "check": "0", "sites": []})
        self._file(staging / "journal.jsonl", line, 0.4)
        self._file(staging / "commit.json.draft", "{", 0.1)
        self._touch(staging, 0o700)

    def _folder_of_new(self, path: Path) -> None:
        path.mkdir()
        if self.rng.random() < 0.5:
            (path / "it").write_text("planted")
        else:
            self._inner(path / "it", lambda inner: inner.mkdir())
        if self.rng.random() < 0.3:
            self._file(path / "beside", "planted", 1.0)
        self._touch(path, 0o755)

    def _inner(self, path: Path, make: Callable[[Path], None]) -> None:
        """Create a folder, or something else in its place."""
        kind = self._kind("folder", "link", "pipe", "file", "nothing")
        if kind == "folder":
            make(path)
            self._touch(path, 0o755)
        elif kind == "link":
            path.symlink_to(self.rng.choice((self.victim, self.victim / "new", Path("."), Path(".."))))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "file":
            path.write_text("planted")

    def _file(self, path: Path, text: str, often: float) -> None:
        """Create a file, or something else in its place."""
        if self.rng.random() > often:
            return
        kind = self.rng.choice(
            ("file",) * 6 + ("changed", "changed", "cut", "link", "pipe", "sparse", "folder", "deep")
        )
        if kind == "link":
            path.symlink_to(self.rng.choice((self.victim / "precious", Path("/dev/zero"), Path("nowhere"))))
        elif kind == "pipe":
            os.mkfifo(path)
        elif kind == "folder":
            path.mkdir()
        elif kind == "sparse":
            with path.open("wb") as file:
                file.truncate(2**35)
        elif kind == "deep":
            path.write_text(self.rng.choice(("[", '{"a":')) * 50_000)
        else:
            raw = text.encode()
            if kind == "changed" and text[0] == "{" and text != "{":
                raw = json.dumps(change(json.loads(text), self.rng)).encode()
            path.write_bytes(raw if kind != "cut" else flip(raw, self.rng))
            self._touch(path, 0o644)

    def _journal(self, staging: Path) -> str:
        """Return a journal that is valid except for values that an attacker cannot know, or knows only by luck."""
        rng = self.rng
        known = {
            name: (staging / "new" / name).lstat().st_ino if os.path.lexists(staging / "new" / name) else 1
            for name in rng.choice((["it"], ["it"], ["beside", "it"], ["it", "beside"], ["precious"]))
        }
        if rng.random() < 0.3:
            known = dict.fromkeys(known, 1)
        folder = staging.stat().st_ino if rng.random() < 0.7 else 1
        companions = rng.choice(([], ["beside"], ["it.data"], ["../victim/precious"]))
        return json.dumps({"folder": folder, "place": known, "companions": companions, "replace": rng.random() < 0.6})

    def _touch(self, path: Path, mode: int) -> None:
        """Set the permissions and the owner."""
        if self.wild and self.rng.random() < 0.1:
            mode = self.rng.choice((0o777, 0o1777, 0o770, 0o755, 0o644, 0o600))
        path.chmod(mode)
        if self.wild and self.rng.random() < 0.12:
            os.chown(path, OTHER, OTHER)

    def _foreign(self) -> State:
        """Return the state of folders that belong to another user, with their contents."""
        states: State = {}
        for path in [self.shared, *self.shared.rglob("*")]:
            if path.is_dir() and not path.is_symlink() and path.lstat().st_uid == OTHER:
                states |= state(path)
        return states


def outcome(planted: Planted) -> str:
    """Write next to the planted folder and return what happened."""
    shared, rng = planted.shared, planted.rng
    act = rng.choice(("recover", "text", "folder", "resume", "resume") + ("resume",) * 4 * (not planted.wild))
    if act == "recover":
        recover(shared)
        return act
    try:
        if act == "text":
            write_text(shared / "it", "made", force=rng.random() < 0.7)
            assert (shared / "it").read_text() == "made" and not (shared / "it").is_symlink()
            return act
        resume = WORK if act == "resume" else None
        with staged(shared / "it", force=True, replaceable=Path.is_dir, resume=resume) as folder:
            staging = folder.parent.parent
            went_on = folder.exists()
            if went_on:  # all of it belongs to this user
                assert staging == planted.staging and resume and own(staging)
                shutil.rmtree(folder) if folder.is_dir() else folder.unlink()
            folder.mkdir()
            Journal(staging, folder).done()
            (folder / "data").write_text("made")
    except GraftError as error:
        assert error.code in ("GC063", "GC064"), str(error)
        return f"{act} {error.code}"
    assert [(path.name, path.read_text()) for path in (shared / "it").iterdir()] == [("data", "made")]
    assert all(path.lstat().st_uid == os.geteuid() for path in (shared / "it", shared / "it" / "data"))
    return f"{act} on" if went_on else act


def own(folder: Path) -> bool:
    return all(
        path.lstat().st_uid == os.geteuid() and not path.is_symlink() and (path.is_dir() or path.is_file())
        for path in [folder, *folder.rglob("*")]
    )


def run(place: Path, number: int) -> str:
    planted = Planted(place, number)
    victim = state(planted.victim)
    began = time.monotonic()
    said = outcome(planted)
    took = time.monotonic() - began
    assert state(planted.victim) == victim, "the folder beside it has changed"
    now = {name: seen for name, seen in planted._foreign().items() if name in planted.foreign}
    assert now.keys() == planted.foreign.keys(), "a folder of another user's has gone"
    assert now == planted.foreign, "a folder of another user's has changed"
    assert took < SECONDS, f"{took:.1f} s"
    return said


def _checked(place: Path, numbers: range, patch: pytest.MonkeyPatch) -> set[str]:
    patch.setattr(os, "fsync", lambda _: None)  # syncing would only cost time
    endings = set()
    for number in numbers:
        try:
            endings.add(run(place, number))
        except BaseException as error:
            raise AssertionError(f"number {number}: {type(error).__name__}: {error}") from error
    return endings


@pytest.mark.slow
@as_root
def test_fuzz_staging_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    endings = _checked(tmp_path / "place", range(SAMPLE), monkeypatch)
    assert {"recover", "text", "folder", "resume", "resume on"} <= endings and any("GC063" in each for each in endings)


@pytest.mark.gate
@as_root
def test_fuzz_staging(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _checked(tmp_path / "place", range(SAMPLE, COUNT), monkeypatch)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that every user can reach; pytest makes its own folders private again whenever a run of it starts."""
    folder = Path(tempfile.mkdtemp(prefix="graftc-public-"))
    try:
        folder.chmod(0o755)
        if not all(above.stat().st_mode & stat.S_IXOTH for above in folder.parents):
            raise unittest.SkipTest("temporary files are where only root gets")
        yield folder
    finally:
        shutil.rmtree(folder)


@pytest.mark.slow
@as_root
def test_fuzz_staging_as_a_user(public: Path) -> None:
    """Check staging as a user other than root, in folders of root and of another user."""
    for number in range(min(COUNT, 12)):
        planted = Planted(public / "place", number)
        planted.shared.chmod(0o1777)
        victim, foreign = state(planted.victim), planted._foreign()
        child = fork()
        if child == 0:
            status = 1
            try:
                os.setresgid(USER, USER, USER)
                os.setresuid(USER, USER, USER)
                if planted.rng.random() < 0.5:
                    write_text(planted.shared / "mine", "made")
                    status = 0 if (planted.shared / "mine").read_text() == "made" else 2
                else:
                    with staged(planted.shared / "own", resume=WORK) as file:
                        file.write_text("made")
                    status = 0 if (planted.shared / "own").stat().st_uid == USER else 3
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, number
        assert state(planted.victim) == victim, number
        assert {name: seen for name, seen in planted._foreign().items() if name in foreign} == foreign, number
