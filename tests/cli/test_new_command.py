"""A command is added with one file and its name in the registry."""

from __future__ import annotations

from pathlib import Path

import pytest
from jsonschema import Draft202012Validator

from graftc.cli import commands, registry
from graftc.cli.schemas import published_schema
from tests.cli.support import run_here

SIZE = '''
"""``graftc size``: the bytes of an artifact's tensors, by adaptation."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graftc.cli.command import CommandRun, command
from graftc.cli.options import ArtifactArgument
from graftc.records.diagnostics import Diagnostic
from graftc.specs.records.record import Record

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class SizeResult(Record, published="SizeResult"):
    """`graftc size DIR --json`."""

    artifact: str
    """The artifact's folder."""

    bytes: Mapping[str, int]
    """The bytes of tensors, by adaptation."""

    warnings: tuple[Diagnostic, ...] = ()
    """Warnings."""


@command()
def size(run: CommandRun, directory: ArtifactArgument) -> SizeResult:
    """Show how many bytes the tensors of each adaptation take."""
    from graftc.passes.core.weights.names import owner_of
    from graftc.runtime.artifact import open_artifact

    sizes: Counter[str] = Counter()
    for name, record in open_artifact(directory).snapshot.adapters.items():
        sizes[owner_of(name)] += record.nbytes
    return SizeResult(str(directory), dict(sizes))


@size.shows
def _show(result: SizeResult, to: Console) -> None:
    for name, count in result.bytes.items():
        to.print(f"{name}: {count} bytes")
'''


@pytest.fixture
def _added(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "size.py").write_text(SIZE, encoding="utf-8")
    monkeypatch.setattr(commands, "__path__", [*commands.__path__, str(tmp_path)])
    monkeypatch.setattr(registry, "_COMMANDS", (*registry._COMMANDS, "size"))


@pytest.mark.slow
@pytest.mark.usefixtures("_added")
def test_a_file_and_a_name_are_a_command_with_json_and_a_schema(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("spec.yaml").write_text("adapt: [{method: lora, rank: 2, target: {role: attn.q}}]", encoding="utf-8")
    compiled = run_here(
        capsys, "compile", "spec.yaml", "-m", "graftc.testing.families:bert", "-o", "a", "--no-certify", "--json"
    )
    expected = {each["name"]: each["bytes"] for each in compiled.data["adaptations"]}
    registry.commands.cache_clear()
    try:
        assert "size" in run_here(capsys, "--help").out
        printed = run_here(capsys, "size", "a", "--json")
        assert printed.data == {"artifact": "a", "bytes": expected, "warnings": []} and printed.status == 0
        schema = published_schema("size")
        Draft202012Validator(schema).validate(printed.data)
        assert schema["properties"]["bytes"]["description"] == "The bytes of tensors, by adaptation."
        assert run_here(capsys, "size", "a").out == f"lora: {expected['lora']} bytes\n"
        missing = run_here(capsys, "size", "nowhere", "--json")
        assert missing.status == 3 and missing.data["error"]["code"].startswith("GC0")
    finally:
        registry.commands.cache_clear()
