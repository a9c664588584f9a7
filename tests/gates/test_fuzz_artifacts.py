"""Thousands of changed artifacts, each sealed again, through everything that reads artifacts.

Only coded errors are raised; nothing hangs, takes much memory, or reads or writes a file outside. ``make fuzz`` runs
a twentieth of ``FUZZ``; the ordinary tests run a sample.
"""

from __future__ import annotations

import contextlib
import copy
import io
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.cli import main
from graftc.runtime.artifact import open_artifact
from graftc.runtime.loading.verify import verify
from graftc.specs.errors.diagnostics import GraftError
from graftc.testing.compare import inputs_for
from tests.gates.counts import MODELS
from tests.gates.mutate import mutate
from tests.kit.folders import adapted_folder, saved_base
from tests.kit.places import ROOT

SAMPLE = 30
SECONDS = 5
MEMORY = 1 << 30

_WATCHED: list[tuple[str, str, bool]] | None = None
_CODE = tuple(p for p in (*sys.path, sys.prefix, sys.base_prefix, str(ROOT)) if p)
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom")


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    """Record every file that is opened or changed and every program that is started."""
    if _WATCHED is None or event not in _PLACES:
        return
    opened = event == "open"
    writes = not opened or bool(int(arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    for where, beside in _PLACES[event]:
        if not isinstance(arguments[where], str | bytes | os.PathLike):
            continue
        path = os.fsdecode(arguments[where])
        if not os.path.isabs(path):
            if opened:  # the event does not name its folder; the system's own log does
                continue
            folder = arguments[beside] if beside is not None else None
            path = os.path.join(f"/proc/self/fd/{folder}" if type(folder) is int and folder >= 0 else ".", path)
        _WATCHED.append((event, os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path)), writes))


_PROGRAMS = frozenset(("os.system", "os.posix_spawn", "os.exec", "subprocess.Popen"))
_PLACES: dict[str, tuple[tuple[int, int | None], ...]] = {
    **dict.fromkeys(("open", "os.truncate", *_PROGRAMS), ((0, None),)),
    **dict.fromkeys(("os.remove", "os.rmdir"), ((0, 1),)),
    **dict.fromkeys(("os.mkdir", "os.chmod"), ((0, 2),)),
    **dict.fromkeys(("os.chown", "os.utime"), ((0, 3),)),
    **dict.fromkeys(("os.rename", "os.link"), ((0, 2), (1, 3))),
    "os.symlink": ((1, 2),),
}
"""Where an event has paths, and each the descriptor of the folder that it is in."""


sys.addaudithook(_audit)


@contextmanager
def watched(folder: Path, *programs: str) -> Iterator[None]:
    """Check that the block accesses only files below a folder.

    Files of Python and the system may also be read. Nothing may be changed outside the folder, and only the named
    programs may be started.
    """
    global _WATCHED
    _WATCHED = []
    try:
        yield
    finally:
        events, _WATCHED = _WATCHED, None
    cache = os.environ.get("GRAFTC_CACHE", str(folder))  # the user's own captures
    reads, writable = (str(folder), cache, *_CODE, *_SYSTEM), (str(folder), cache, "/dev/null")
    outside = [
        (event, path)
        for event, path, writes in events
        if not path.startswith(writable if writes else reads) and "__pycache__" not in path
        if not (event in _PROGRAMS and path in programs)
    ]
    assert not outside, outside[:5]


@contextmanager
def bounded() -> Iterator[None]:
    """Fail if the block takes too much processor time or memory."""

    def late(*_: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) << 10
    assert grown < MEMORY, f"{grown >> 20} MB more"


@contextmanager
def temporary(folder: Path) -> Iterator[None]:
    """Create temporary files below a folder while the block runs."""
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    try:
        yield
    finally:
        tempfile.tempdir = before


class Fuzzed:
    """One small artifact with its base, and the checks of each changed copy of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        compiled = adapted_folder(saved_base(folder / "base", num_hidden_layers=1))
        self.intact = Path(compiled.save(folder / "artifact"))
        self.base = compiled.compilation.source
        self.state = copy.deepcopy(self.base.state_dict())
        self.inputs = inputs_for(compiled)
        self.run(0, change=False)  # runs lazy imports first

    def run(self, number: int, *, change: bool = True, every: int = 1) -> str:
        """Change the artifact, read it in every way, and return ``refused`` or ``read``.

        Only one artifact in ``every`` is also inspected and loaded.
        """
        changed = self.folder / "changed"
        shutil.rmtree(changed, ignore_errors=True)
        shutil.copytree(self.intact, changed)
        what = mutate(changed, number) if change else "nothing"
        outcomes = []
        ways = [self._verify, *([self._inspect, self._load] if number % every == 0 else [])]
        for read in [*ways, *([self._commands] if number % (20 * every) == 0 else [])]:
            try:
                with bounded(), watched(self.folder), temporary(self.folder):
                    read(changed)
                outcomes.append("read")
            except GraftError as error:
                assert error.code != "GC099", what
                outcomes.append("refused")
            except BaseException as error:
                raise AssertionError(f"{what}: {read.__name__}: {type(error).__name__}: {error}") from error
        assert all(torch.equal(t, self.state[name]) for name, t in self.base.state_dict().items()), what
        return "refused" if "refused" in outcomes else "read"

    def _verify(self, changed: Path) -> None:
        verification = verify(changed, files_only=True)
        if not verification.passed:
            raise GraftError("GC082", "verify says no")

    def _inspect(self, changed: Path) -> None:
        snapshot = open_artifact(changed).snapshot
        for mode in ("train", "eval"):
            snapshot.program(mode)

    def _load(self, changed: Path) -> None:
        compiled = graftc.load(changed, self.base, cache=False).eval()
        compiled(**self.inputs)

    def _commands(self, changed: Path) -> None:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            self._run(changed)

    def _run(self, changed: Path) -> None:
        for words in (["inspect"], ["inspect", "--graph"], ["verify", "--files-only"]):
            assert main([words[0], str(changed), *words[1:], "--json"]) in (0, 1, 2, 3)
        out = str(self.folder / "merged")
        shutil.rmtree(out, ignore_errors=True)
        assert main(["merge", str(changed), "--out", out, "--json"]) in (0, 1, 2, 3)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory: pytest.TempPathFactory) -> Fuzzed:
    return Fuzzed(tmp_path_factory.mktemp("fuzz"))


def _many(fuzzed: Fuzzed, numbers: range, every: int = 1) -> None:
    started, counts = time.monotonic(), {"read": 0, "refused": 0}
    failures = []
    for number in numbers:
        try:
            counts[fuzzed.run(number, every=every)] += 1
        except AssertionError as error:
            failures.append(f"{number}: {str(error)[:300]}")
            print(failures[-1], flush=True)
    print(f"{counts} in {time.monotonic() - started:.0f} s")
    assert not failures, "\n".join(failures[:20])
    assert counts["refused"] > len(numbers) // 4 and counts["read"]


@pytest.mark.slow
def test_a_sample(fuzzed: Fuzzed) -> None:
    _many(fuzzed, range(1, SAMPLE + 1), every=6)


@pytest.mark.gate
def test_all(fuzzed: Fuzzed) -> None:
    _many(fuzzed, range(1, MODELS + 1))


_WRITES = re.compile(
    r"^\d+\s+(?:unlink|rename|mkdir|rmdir|link|symlink|f?chmod|truncate|mknod)\w*\(|\bO_(?:WRONLY|RDWR|CREAT)\b"
)
_PATH = re.compile(r'"((?:[^"\\]|\\.)*)"')


@pytest.mark.gate
@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed (apt-get install strace)")
def test_what_the_system_sees(tmp_path: Path) -> None:
    """With 200 of them, no system call writes to a file outside the folder."""
    log = tmp_path / "log"
    script = (
        "import pathlib, sys; from tests.gates.test_fuzz_artifacts import Fuzzed; "
        "fuzzed = Fuzzed(pathlib.Path(sys.argv[1])); print('READY', open('/dev/null').close()); "
        f"[fuzzed.run(number) for number in range(1, {min(MODELS, 200) + 1})]"
    )
    (tmp_path / "work").mkdir()
    command = ["strace", "-f", "-qq", "-e", "trace=%file", "-o", str(log), sys.executable, "-c", script]
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "GRAFTC_CACHE": "off",
        "TORCHINDUCTOR_CACHE_DIR": str(tmp_path),
    }
    subprocess.run([*command, str(tmp_path / "work")], check=True, cwd=ROOT, env=environment)
    lines = [line for line in log.read_text(errors="replace").splitlines() if " = -1 " not in line]
    written = [path for line in lines if _WRITES.search(line) for path in _PATH.findall(line)]
    allowed = (str(tmp_path), "/dev/null", "/proc/self/")
    outside = [path for path in written if os.path.isabs(path) and not path.startswith(allowed)]
    assert not [path for path in outside if "__pycache__" not in path]
    assert not [path for line in lines for path in _PATH.findall(line) if path == "/dev/zero"]
