"""The process of a command: no external text controls the terminal, and no way to end prints a traceback."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from graftc.cli import output
from graftc.specs import GraftError, Place
from graftc.specs.errors.text import printable
from tests.cli.support import run_apart, run_here
from tests.kit.places import ROOT

ENV = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
COMMAND = f"{sys.executable} -m graftc"
HOSTILE = tuple(
    ["\x1b[31m", "\x1b]0;title\x07", "\x9b31m", "\x85", "\x7f", "\r", "\u202e", "\u2066", "\u200f", "\u061c", "\u2028"]
)


def shell(line: str, **environment: str) -> tuple[int, str, str]:
    """Return status, output and errors of a line of bash."""
    done = subprocess.run(["bash", "-c", line], capture_output=True, cwd=ROOT, env={**ENV, **environment}, timeout=120)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


# --- what is printed ----------------------------------------------------------------------------------------------


def console(**options: Any) -> tuple[Any, io.StringIO]:
    out = io.StringIO()
    return output.console(out), out


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_nothing_printed_steers_a_terminal(hostile: str) -> None:
    from rich.table import Table
    from rich.text import Text

    word = f"a{hostile}b[bold]c[/nothing] :smile:"
    to, out = console()
    table = Table(word)
    table.add_row(word)
    to.print(word)
    to.print(f"{word} fits", soft_wrap=True)
    to.print(Text(word))
    to.print(table)
    output.print_table(to, (word,), [(word,)])
    output.print_lines(to, [word], lambda line: "green")
    shown = out.getvalue()
    assert printable(shown) == shown
    assert shown.count(printable(word).replace("\n", "")) >= 5 and "[bold]c[/nothing] :smile:" in shown


@pytest.mark.parametrize("hostile", HOSTILE, ids=ascii)
def test_no_error_steers_a_terminal(hostile: str, capsys: pytest.CaptureFixture[str]) -> None:
    inner = GraftError("GC002", f"m{hostile}", hint=hostile)
    place = Place(f"f{hostile}", 1, 1, f"p{hostile}", f"t{hostile}")
    error = GraftError(
        "GC002", f"m{hostile}", place=place, hint=f"h{hostile}", details=[f"d{hostile}", inner], corrected=hostile
    )
    assert printable(str(error)) == str(error)
    output.print_coded(error, "red")
    shown = capsys.readouterr().err
    assert printable(shown) == shown and shown.count(printable(hostile)) >= 7
    output.print_json(error.to_json())
    text = capsys.readouterr().out
    assert printable(text) == text and json.loads(text) == error.to_json()


@pytest.mark.parametrize("hostile", [h for h in HOSTILE if h.isascii()], ids=ascii)
@pytest.mark.parametrize("where", ["key", "glob", "method", "role", "value"])
def test_specs_do_not(hostile: str, where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data: dict[str, Any] = {"method": "lora", "target": {"role": "attn.q"}}
    data |= {"key": {f"r{hostile}": 1}, "glob": {"target": {"modules": f"{{a{hostile}"}}, "method": {"method": hostile},
             "role": {"target": {"role": hostile + "q"}}, "value": {"init": hostile}}[where]  # fmt: skip
    path = tmp_path / "spec.json"
    path.write_text(json.dumps({"adapt": [data]}), encoding="utf-8")
    outcome = run_here(capsys, "check", str(path), "--model", "m")
    assert (
        outcome.status == 2
        and printable(outcome.err) == outcome.err
        and ascii(hostile)[1:-1] in outcome.err.replace(r"\x0d", r"\r")
    )
    assert "Traceback" not in outcome.err


@pytest.mark.slow
def test_names_of_files_that_are_no_utf8(tmp_path: Path) -> None:
    path = os.fsencode(tmp_path) + b"/\xff\x1b[31m.yaml"
    for options in ([], ["--json"]):
        command = [sys.executable, "-m", "graftc", "check", path, "--model", "m", *options]
        done = subprocess.run(command, capture_output=True, cwd=ROOT, env=ENV, timeout=120)
        assert done.returncode == 2 and b"Traceback" not in done.stderr and b"\x1b" not in done.stderr + done.stdout
        assert b"GC006" in done.stdout + done.stderr


# --- how it ends --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["²", "0", "-5", "", "x", "9" * 50, "1"])
@pytest.mark.parametrize("name", ["COLUMNS", "LINES"])
def test_sizes_of_the_terminal(
    name: str, value: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    outcome = run_here(capsys, "methods")
    assert outcome.status == 0 and "".join(outcome.out.split()).count("lora") > 2


@pytest.mark.slow
@pytest.mark.parametrize("value", ["²", "0"])
def test_sizes_of_the_terminal_for_help(value: str) -> None:
    outcome = run_apart("--help", COLUMNS=value, LINES=value, TERMINAL_WIDTH=value)
    assert outcome.status == 0 and "Usage: graftc" in outcome.out


FULL = pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")


@pytest.mark.full
@FULL
@pytest.mark.parametrize("options", ["methods", "--help", "methods lorra --json"])
def test_an_output_that_cannot_be_written(options: str) -> None:
    status, _, err = shell(f"{COMMAND} {options} > /dev/full")
    assert status == 3 and "GC064" in err and "no space left" in err
    assert "Traceback" not in err and "Exception" not in err


@pytest.mark.full
@pytest.mark.parametrize("options", ["methods", "methods --json"])
def test_an_output_that_is_closed(options: str) -> None:
    status, _, err = shell(f"{COMMAND} {options} >&-")
    assert status == 3 and "GC064" in err and "Traceback" not in err


@pytest.mark.full
@pytest.mark.parametrize(("options", "status"), [("methods --json", 0), ("methods lorra", 2)])
def test_errors_that_nobody_hears(options: str, status: int) -> None:
    for where in ("2>&- <&-", "2>/dev/full"):
        exit_status, out, _ = shell(f"{COMMAND} {options} {where}")
        assert exit_status == status and bool(out) == (status == 0), where


@pytest.mark.slow
def test_all_streams_closed() -> None:
    assert shell(f"{COMMAND} methods lorra <&- >&- 2>&-")[0] == 2


@pytest.mark.full
@pytest.mark.parametrize("options", ["methods", "schema"])
def test_a_reader_that_has_gone(options: str) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "graftc", *options.split()]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, cwd=ROOT, env=ENV, timeout=120)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.mark.full
@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}]
)
@pytest.mark.parametrize("options", [[], ["--json"]])
def test_ascii_terminals(environment: dict[str, str], options: list[str], tmp_path: Path) -> None:
    path = tmp_path / "spec.yaml"
    path.write_text("adapt: [{method: lörä, target: {role: attn.q}}]", encoding="utf-8")
    outcome = run_apart("check", str(path), "--model", "m", *options, **environment)
    assert outcome.status == 2 and outcome.out.isascii() and outcome.err.isascii()
    assert ("Traceback" not in outcome.err and r"l\xf6r" in outcome.err) or r"l\u00f6r" in outcome.out
    if not options:
        assert run_apart("methods", **environment).status == 0


_INTERRUPTED = """
import os, signal, sys
class Finder:
    def find_spec(self, name, *_):
        if name == {name!r}:
            os.kill(os.getpid(), signal.SIGINT)
# A job in the background of a shell, which ignores interrupts, hands that down.
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.meta_path.insert(0, Finder())
from graftc.cli import main
sys.exit(main())
"""


@pytest.mark.parametrize(
    "name", ["graftc.cli.app", "typer", "graftc.specs.errors.diagnostics", "graftc.specs.listing", "pydantic"]
)
def test_an_interrupt_while_modules_are_imported(name: str) -> None:
    """Interrupts are handled from the command's first line on; before that the interpreter itself is starting."""
    command = [sys.executable, "-c", _INTERRUPTED.format(name=name), "methods", "--json"]
    done = subprocess.run(command, capture_output=True, cwd=ROOT, env=ENV, timeout=60)
    assert (done.returncode, done.stdout, done.stderr.strip()) == (130, b"", b"")


def test_little_is_imported_before_interrupts_are_handled() -> None:
    code = "import sys; before = set(sys.modules); import graftc.cli; print(sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, cwd=ROOT, env=ENV, text=True).stdout
    assert out.strip() == str(["__future__", "graftc", "graftc.cli", "graftc.version"])


def test_an_interrupt_at_work(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    for name in ("graftc.specs.listing.methods", "graftc.cli.app.build_app"):
        with monkeypatch.context() as patch:
            patch.setattr(name, interrupted)
            outcome = run_here(capsys, "methods")
            assert outcome.status == 130 and "Traceback" not in outcome.err


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_an_interrupt_while_a_failure_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    def interrupted(*_: object, **more: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("graftc.cli.failures.show_failure", interrupted)
    assert run_here(capsys, "methods", "nope", *options).status == 130
