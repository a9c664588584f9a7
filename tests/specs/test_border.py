"""Reading files of unknown origin: library errors get a code, and only regular files of limited size are read."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from graftc.specs import GraftError
from graftc.specs.errors.border import is_failure, library_errors
from graftc.specs.errors.diagnostics import GraftWarning
from graftc.specs.regular_files import open_regular, read_regular, require_regular

FAILURES: dict[str, BaseException] = {
    "ValueError": ValueError("no\nsecond line"),
    "OSError": OSError(5, "bad"),
    "MemoryError": MemoryError(),
    "RecursionError": RecursionError("deep"),
    "KeyError": KeyError("k"),
    "panic": type("PanicException", (BaseException,), {})("index out of bounds"),
}
PASSING: dict[str, BaseException] = {
    "KeyboardInterrupt": KeyboardInterrupt(),
    "SystemExit": SystemExit(3),
    "GeneratorExit": GeneratorExit(),
    "CancelledError": asyncio.CancelledError(),
    "GraftError": GraftError("GC006", "own"),
    "GraftWarning": GraftWarning("GC075", "own"),
}


class TestLibraryErrors:
    @pytest.mark.parametrize("name", FAILURES)
    def test_failures_are_coded(self, name: str) -> None:
        with pytest.raises(GraftError) as caught, library_errors("GC146", "it cannot be read", hint="try"):
            raise FAILURES[name]
        assert caught.value.code == "GC146" and caught.value.hint == "try"
        assert caught.value.message.startswith("it cannot be read: ") and "second" not in caught.value.message
        assert caught.value.__cause__ is FAILURES[name] and is_failure(FAILURES[name])

    @pytest.mark.parametrize("name", PASSING)
    def test_others_pass(self, name: str) -> None:
        with pytest.raises(type(PASSING[name])) as caught, library_errors("GC146", "it cannot be read"):
            raise PASSING[name]
        assert caught.value is PASSING[name]

    def test_codes_by_kind_and_late_messages(self) -> None:
        asked: list[int] = []

        def message() -> str:
            asked.append(1)
            return "late"

        with library_errors("GC146", message, codes={OSError: "GC032"}):
            pass
        assert not asked
        guard = library_errors("GC146", message, codes={OSError: "GC032"})
        with pytest.raises(GraftError, match="late: FileNotFoundError") as caught, guard:
            raise FileNotFoundError(2, "x")
        assert caught.value.code == "GC032" and asked == [1]

    @pytest.mark.filterwarnings("ignore")
    def test_panic_of_a_real_library(self, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
        from tokenizers import Tokenizer

        model = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]], "byte_fallback": False}
        charsmap = {"type": "Precompiled", "precompiled_charsmap": "AAAA/wAA"}
        empty = dict.fromkeys(("truncation", "padding", "pre_tokenizer", "post_processor", "decoder"))
        data: dict[str, object] = {
            "version": "1.0",
            "added_tokens": [],
            "normalizer": charsmap,
            "model": model,
            **empty,
        }
        with pytest.raises(GraftError) as caught, library_errors("GC146", "it cannot be read"):
            Tokenizer.from_str(json.dumps(data | empty))
        assert caught.value.code == "GC146" and not isinstance(caught.value.__cause__, GraftError)


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _link_to_fifo(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        previous = os.getcwd()
        os.chdir(path.parent)  # the path of a socket must be short
        try:
            sock.bind(path.name)
        finally:
            os.chdir(previous)


def _device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def _sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(2**36)


def _long(path: Path) -> None:
    path.write_bytes(bytes(1001))


MADE: dict[str, Callable[[Path], None]] = {
    "fifo": _fifo,
    "fifo behind a link": _link_to_fifo,
    "socket": _socket,
    "device": _device,
    "sparse": _sparse,
    "long": _long,
    "folder": Path.mkdir,
    "nothing": lambda path: None,
    "broken link": lambda path: path.symlink_to("nowhere"),
    "link to itself": lambda path: path.symlink_to(path.name),
}


class TestRegularFiles:
    @pytest.mark.parametrize("kind", MADE)
    def test_others_are_refused_at_once(self, tmp_path: Path, kind: str) -> None:
        path = tmp_path / "file"
        MADE[kind](path)
        began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for act in (lambda: read_regular(path, 1000), lambda: open_regular(path, 1000)):
            with pytest.raises(OSError):
                act()
        with pytest.raises(OSError):
            require_regular(path, 1000)
        assert time.monotonic() - began < 1 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 2**16

    @pytest.mark.parametrize("size", [0, 1, 1000])
    def test_regular_files_are_read(self, tmp_path: Path, size: int) -> None:
        path = tmp_path / "file"
        path.write_bytes(b"x" * size)
        (tmp_path / "link").symlink_to("file")
        assert read_regular(path, 1000) == read_regular(tmp_path / "link", 1000) == b"x" * size
        with open_regular(path) as file:
            assert file.read() == b"x" * size

    def test_links_and_folders_of_descriptors(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"here")
        (tmp_path / "link").symlink_to("file")
        folder = os.open(tmp_path, os.O_RDONLY)
        try:
            assert read_regular("file", folder=folder, follow=False) == b"here"
            with pytest.raises(OSError, match="link"):
                read_regular("link", folder=folder, follow=False)
        finally:
            os.close(folder)

    @pytest.mark.parametrize("name", ["a\0b", "x" * 300])
    def test_names_that_no_file_has(self, tmp_path: Path, name: str) -> None:
        with pytest.raises(OSError):
            read_regular(tmp_path / name)

    def test_a_file_that_was_replaced_by_a_pipe(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path, real = tmp_path / "file", os.open
        path.write_text("x")

        def replaced(name: str, *rest: int, **options: int) -> int:
            path.unlink()
            os.mkfifo(path)
            return real(name, *rest, **options)

        monkeypatch.setattr(os, "open", replaced)
        with pytest.raises(OSError, match="regular"):
            read_regular(path)
