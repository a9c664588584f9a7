"""Shell completion, requested as shells do, and options that commands share."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from graftc.cli import completion
from graftc.cli.options import destination
from graftc.cli.schemas import schema_names
from graftc.specs.errors.diagnostics import GraftError
from graftc.specs.registry import method_specs
from tests.cli.support import run_here
from tests.kit.places import ROOT


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("one.yaml", "two.toml", "notes.txt", ".hidden.yaml", "models/base/config.json", "my spec.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("", encoding="utf-8")
    hub = tmp_path / "home" / "hub" / "models--sentence-transformers--all-MiniLM-L6-v2"
    hub.mkdir(parents=True)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.chdir(tmp_path)


def offered(words: str) -> list[str]:
    """Return bash's completions of the last word of a command line."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "_GRAFTC_COMPLETE": "complete_bash",
        "COMP_WORDS": words,
        "COMP_CWORD": str(len(words.split(" ")) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-m", "graftc"], env=environment, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stderr == ""
    return done.stdout.splitlines()


@pytest.mark.full
def test_a_shell_is_offered_commands_options_and_values() -> None:
    assert {"compile", "methods", "schema", "roles", "check"} <= set(offered("graftc "))
    assert offered("graftc chec") == ["check"]
    assert offered("graftc methods ") == list(method_specs())
    assert set(offered("graftc schema ")) == set(schema_names())
    assert {"--model", "--meta", "--json"} <= set(offered("graftc check --"))
    assert offered("graftc check ") == ["home/", "models/", "my spec.json", "one.yaml", "two.toml"]
    assert offered("graftc check one.yaml --model mod") == ["models/"]
    assert offered("graftc roles models/") == ["models/base/"]
    assert offered("graftc export models --format ") == ["onnx", "onnx-generate", "onnx-adapter", "pt2", "gguf", "peft"]
    assert offered("graftc merge mo") == ["models/"]


def test_completion_is_installed_by_options_of_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    text = run_here(capsys, "--help").out
    assert "--install-completion" in text and "--show-completion" in text


def test_spec_files() -> None:
    assert completion.specs("") == ["home/", "models/", "my spec.json", "one.yaml", "two.toml"]
    assert completion.specs(".h") == [".hidden.yaml"]
    assert completion.specs("./o") == ["./one.yaml"]
    assert completion.specs(f"{Path.cwd()}/t") == [f"{Path.cwd()}/two.toml"]
    assert completion.specs("nowhere/") == []


def test_models_are_folders_and_what_the_hub_cache_holds() -> None:
    assert completion.models("") == ["home/", "models/"]
    assert completion.models("sent") == ["sentence-transformers/all-MiniLM-L6-v2"]
    assert completion.models("sentence-transformers/all") == ["sentence-transformers/all-MiniLM-L6-v2"]
    assert completion.models("zzz") == []
    assert completion.artifacts("mo") == ["models/"]


def test_methods_come_with_what_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lora" in dict(completion.methods("lo")) and all(dict(completion.methods("")).values())

    def broken() -> None:
        raise GraftError("GC071", "a plugin is broken")

    monkeypatch.setattr("graftc.specs.listing.methods", broken)
    assert completion.methods("") == []


def test_a_destination_is_needed_unless_nothing_is_written() -> None:
    assert destination(Path("x"), dry_run=False) == Path("x")
    assert destination(Path("x"), dry_run=True) is None and destination(None, dry_run=True) is None
    with pytest.raises(GraftError, match="GC090"):
        destination(None, dry_run=False)
