"""An engine that is missing, refuses, crashes, hangs or answers too little causes an error with a code."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from graftc.runtime.serving.running import DRIVERS, EngineAnswer, run_engine
from graftc.specs.errors.diagnostics import GraftError

DRIVER_FILES = Path(sys.modules[run_engine.__module__].__file__ or "").with_name("drivers")


def interpreter(folder: Path, script: str) -> Path:
    """Return a program that stands in for an engine's interpreter."""
    file = folder / "python"
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def run(python: Path, **changes: Any) -> EngineAnswer:
    arguments: dict[str, Any] = {"base": Path("model.gguf"), "prompts": [[1, 2], [3]], "tokens": 2, "python": python}
    return run_engine("llama.cpp", **{**arguments, **changes})


@pytest.mark.parametrize(
    ("script", "code", "words"),
    [
        ("echo half an answer; echo assertion failed >&2; kill -ABRT $$", "GC079", "ended with status -6"),
        ('echo \'{"error": "ValueError: no tensor"}\'', "GC079", "llama.cpp refused: ValueError: no tensor"),
        ('echo \'{"missing": "no module"}\'', "GC061", "is not installed"),
        ("sleep 5", "GC079", "did not answer within 0.5 seconds"),
        ('echo \'{"tokens": [[1, 2]], "version": "1"}\'', "GC079", "answered with 2 tokens"),
        ('echo \'{"tokens": [[1, 2], [3]], "version": "1"}\'', "GC079", "answered with 2, 1 tokens"),
    ],
)
def test_failures(tmp_path: Path, script: str, code: str, words: str) -> None:
    with pytest.raises(GraftError, match=words) as caught:
        run(interpreter(tmp_path, script), limit=0.5 if "sleep" in script else 60.0)
    assert caught.value.code == code
    if "assertion" in script:
        assert caught.value.details == ("assertion failed",)


def test_no_interpreter(tmp_path: Path) -> None:
    with pytest.raises(GraftError, match="cannot be started") as caught:
        run(tmp_path / "python")
    assert caught.value.code == "GC079"


def test_answer(tmp_path: Path) -> None:
    python = interpreter(
        tmp_path, 'echo noise >&2; echo \'{"tokens": [[1, 2], [3, 4]], "version": "1.5", "seconds": [0.5, 0.25]}\''
    )
    assert run(python) == EngineAnswer(((1, 2), (3, 4)), "1.5", "noise\n", (0.5, 0.25))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"adapters": {"a": Path("a")}}, "do not fit the prompts"),
        ({"adapters": {"a": Path("a")}, "chosen": ["a"]}, "do not fit the prompts"),
        ({"adapter": Path("a"), "adapters": {"a": Path("a")}, "chosen": ["a", None]}, "do not fit the prompts"),
        ({"adapters": {"a": Path("a")}, "chosen": ["a", "b"]}, "no adapter is named 'b'"),
    ],
)
def test_arguments(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(GraftError, match=words) as caught:
        run(tmp_path / "python", **changes)
    assert caught.value.code == "GC073"


def test_unknown_engine() -> None:
    with pytest.raises(GraftError, match="there is no driver") as caught:
        run_engine("llamacpp", base=Path("model.gguf"), prompts=[[1]], tokens=1)
    assert caught.value.code == "GC073" and "llama.cpp" in str(caught.value.hint)


def test_drivers_stand_alone() -> None:
    """Every engine has a script, no other script is there, and none imports graftc."""
    files = {file.stem: file.read_text() for file in DRIVER_FILES.glob("*.py") if file.stem not in ("__init__", "main")}
    assert set(files) == {driver.file for driver in DRIVERS.values()}
    assert not any(f"{word} graftc" in text for text in files.values() for word in ("import", "from"))
