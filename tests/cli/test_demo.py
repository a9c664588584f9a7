"""``graftc demo``: its options, its exit status and its JSON. `tests/applications/demo` tests the demo itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from graftc.records.applications.demo import DemoResult, LLMResult
from graftc.records.reading import from_json
from tests.cli.samples import DEMO, LLM_DEMO
from tests.cli.support import run_here


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
@pytest.mark.parametrize(
    ("llm", "runs", "sample", "place"),
    [(False, "demo.run_demo", DEMO, "demo-out"), (True, "llm.run_llm_demo", LLM_DEMO, "demo-llm-out")],
    ids=["encoder", "llm"],
)
def test_options_status_and_json(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    llm: bool,
    runs: str,
    sample: dict[str, Any],
    place: str,
    passed: bool,
    status: int,
) -> None:
    seen: list[tuple[Path, bool]] = []
    record = from_json(LLMResult if llm else DemoResult, json.dumps({**sample, "out": place, "warnings": []}))
    if not passed:
        record = replace(record, certificate=replace(record.certificate, structure="other"))

    def fake(out: Path, quick: bool = False, console: Console | None = None) -> Any:
        seen.append((out, quick))
        assert console is not None
        console.print("working")
        return record

    monkeypatch.setattr(f"graftc.applications.demo.{runs}", fake)
    which = ["--llm"] if llm else []
    plain = run_here(capsys, "demo", *which, "--out", "there", "--quick")
    assert (plain.status, plain.out, plain.err) == (status, "working\n", "")
    data = run_here(capsys, "demo", *which, "--json")
    assert data.status == status and data.err == "working\n"
    assert data.data == record.to_json() and data.data["passed"] == passed
    assert seen == [(Path("there"), True), (Path(place), False)]
