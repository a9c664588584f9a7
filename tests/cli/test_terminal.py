"""Terminals show colours and steps; other outputs, and terminals with NO_COLOR, get no escape codes."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from graftc.cli import output
from tests.cli.support import run_apart
from tests.kit import warm
from tests.kit.places import ROOT

ESCAPE = "\x1b"
CHECK = ("check", "spec.yaml", "--model", "graftc.testing.families:bert")


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "spec.yaml").write_text("adapt: [{method: lora, target: {role: attn.q}}]\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TERM", "xterm-256color")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLORTERM"):
        monkeypatch.delenv(name, raising=False)


def on_a_terminal(*arguments: str, fresh: bool = True, **environment: str) -> tuple[str, str]:
    """Return what a command prints if standard output and standard error are two terminals.

    Without ``fresh`` it runs in an interpreter that has already imported torch.
    """
    (out, out_slave), (err, err_slave) = pty.openpty(), pty.openpty()

    def command() -> None:
        try:
            if not fresh:
                names = {"out": os.ttyname(out_slave), "err": os.ttyname(err_slave)}
                warm.run("graftc", *arguments, cwd=Path.cwd(), **names, environment=environment)
            else:
                env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
                started = [sys.executable, "-m", "graftc", *arguments]
                ends = {"stdin": subprocess.DEVNULL, "stdout": out_slave, "stderr": err_slave}
                subprocess.run(started, **ends, env={**env, **environment}, timeout=120)
        finally:
            for slave in (out_slave, err_slave):
                os.close(slave)

    # Concurrently, because a terminal that is not read blocks the command.
    with ThreadPoolExecutor(3) as pool:
        done = pool.submit(command)
        shown, told = pool.map(_drained, (out, err))
        done.result()
    return shown, told


def _drained(end: int) -> str:
    received = b""
    while True:
        try:
            part = os.read(end, 4096)
        except OSError:  # the other end is closed
            part = b""
        if not part:
            os.close(end)
            return received.decode()
        received += part


@pytest.mark.full
def test_a_terminal_sees_colours_and_steps() -> None:
    assert ESCAPE in on_a_terminal("methods")[0]
    assert f"{ESCAPE}[1;31mGC004:" in on_a_terminal("methods", "lorra")[1]
    out, err = on_a_terminal(*CHECK)
    assert "spec.yaml fits BertForSequenceClassification" in out and "loading" not in out
    assert "loading the model ..." in err and "compiling ..." in err


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [("--help",), ("methods",), ("methods", "lorra"), ("methods", "lora")])
def test_no_color_is_without_escape_codes(arguments: tuple[str, ...]) -> None:
    assert ESCAPE not in "".join(on_a_terminal(*arguments, NO_COLOR="1"))


@pytest.mark.full
@pytest.mark.parametrize("arguments", [("--help",), ("methods",), ("methods", "lorra"), ("check", "--help")])
def test_what_is_no_terminal_sees_no_escape_codes(arguments: tuple[str, ...]) -> None:
    outcome = run_apart(*arguments, cwd=Path.cwd())
    assert ESCAPE not in outcome.out + outcome.err
    assert "loading" not in outcome.err


@pytest.mark.full
def test_json_shows_no_steps() -> None:
    out, err = on_a_terminal(*CHECK, "--json", fresh=False)
    assert err == "" and out.startswith("{")


@pytest.mark.full
def test_steps_without_colours() -> None:
    """NO_COLOR removes all escape codes; `tests/cli/test_check.py` has a check without a terminal."""
    out, err = on_a_terminal(*CHECK, fresh=False, NO_COLOR="1")
    assert ESCAPE not in out + err


def test_steps_are_silent_in_this_process(capsys: pytest.CaptureFixture[str]) -> None:
    with output.steps(False) as step:
        step("capturing")
    assert capsys.readouterr() == ("", "")
