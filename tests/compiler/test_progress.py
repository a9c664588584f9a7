"""Long compiles report their current step, to a terminal or to listeners, and short ones report nothing."""

from __future__ import annotations

import io
import re
import threading
import time
from typing import Any

import pytest

import graftc
from graftc.cli.output import steps
from graftc.passes.core import progress
from graftc.testing.families import tiny

SPEC = {"adapt": [{"name": "low", "method": "lora", "target": {"role": "attn.q"}, "rank": 2}]}


class Terminal(io.StringIO):
    """A stream that is a terminal."""

    def isatty(self) -> bool:
        return True


def slow(monkeypatch: pytest.MonkeyPatch, stream: io.StringIO, seconds: float = 0.1) -> str:
    """Return what a slow compile writes, if a hundredth of a second counts as long."""
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "AFTER", 0.01)
    monkeypatch.setattr(progress, "EVERY", 0.01)
    with progress.working("compiling", "Model"):
        progress.step("capture(train)")
        with progress.working("merging", "Inner"):
            time.sleep(seconds)
        progress.step("roles")
        time.sleep(seconds)
    return stream.getvalue()


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear the settings in the environment."""
    monkeypatch.delenv("GRAFTC_PROGRESS", raising=False)
    monkeypatch.setenv("TERM", "xterm")


def test_one_line_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """The line is overwritten, names the steps in turn, and says at the end how long it took."""
    text = slow(monkeypatch, Terminal())
    assert text.count("\n") == 1 and re.search(r"graftc: compiling Model took \d\.\d s *\n$", text)
    shown = [line.strip() for line in text.split("\r") if line]
    assert "graftc: compiling Model: capture(train), 0 s" in shown and "graftc: compiling Model: roles, 0 s" in shown
    assert not any("Inner" in line for line in shown)
    assert not any(thread.name == "graftc progress" for thread in threading.enumerate())


@pytest.mark.slow
def test_a_quick_compile_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    graftc.compile(SPEC, tiny("bert"))
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("stream", "setting", "term", "asked", "shown"),
    [
        (io.StringIO, None, "xterm", None, False),
        (io.StringIO, "on", "xterm", None, True),
        (io.StringIO, None, "xterm", True, True),
        (Terminal, "off", "xterm", None, False),
        (Terminal, None, "xterm", False, False),
        (Terminal, "off", "xterm", True, True),
        (Terminal, None, "dumb", None, False),
    ],
)
def test_who_is_told(
    stream: Any, setting: str | None, term: str, asked: bool | None, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a terminal, progress is written only on request, and as one line without control characters."""
    monkeypatch.setenv("TERM", term)
    if setting is not None:
        monkeypatch.setenv("GRAFTC_PROGRESS", setting)
    with progress.shown(asked):
        text = slow(monkeypatch, stream(), 0.05)
    assert bool(text) == shown
    assert stream is Terminal or text.count("\r") == 0


def test_a_stream_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compile does not fail because its progress cannot be written."""
    stream = Terminal()
    monkeypatch.setattr("sys.stderr", stream)
    monkeypatch.setattr(progress, "AFTER", 0.01)
    with progress.working("compiling", "Model"):
        stream.close()
        time.sleep(0.05)


@pytest.mark.slow
def test_a_compile_is_told_by_its_steps(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The steps of a real compile are those of its report, which has the time of each."""
    monkeypatch.setattr(progress, "AFTER", 0.0)
    monkeypatch.setattr(progress, "EVERY", 0.001)
    told: list[tuple[str, float]] = []
    with progress.listening(lambda name, seconds: told.append((name, seconds))):
        compiled = graftc.compile(SPEC, tiny("bert"), cache=False)
    report = compiled.report
    names = [step.name for step in report.steps]
    assert {"capture", "anchor", "roles", "resolve", "insert(low)", "verify", "mode(eval)"} <= set(names)
    assert len(names) == len(set(names)) and all(step.seconds >= 0 for step in report.steps)
    assert (
        {"capture(train)", "roles"}
        <= {name for name, _ in told}
        <= {*names, "capture(train)", "capture(eval)"}
        | {
            "anchor(train)",
            "anchor(eval)",
            "",
        }
    )
    seconds = [at for _, at in told]
    assert seconds == sorted(seconds)
    of = {step.name: step.seconds for step in report.steps}
    assert of["capture"] == report.capture_seconds
    rest = sum(at for name, at in of.items() if name not in ("capture", "anchor"))
    assert rest == pytest.approx(report.rewrite_seconds)
    assert report.to_json()["steps"][0] == {"name": "capture", "seconds": of["capture"]}
    graftc.compile(SPEC, tiny("bert"), progress=True)
    assert "took" in capsys.readouterr().err


def test_commands_show_no_second_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --json nothing is shown at all, with or without a terminal."""
    monkeypatch.setenv("GRAFTC_PROGRESS", "on")
    for stream in (Terminal(), io.StringIO()):
        monkeypatch.setattr("sys.stderr", stream)
        with steps(as_json=True):
            assert slow(monkeypatch, stream, 0.05) == ""
