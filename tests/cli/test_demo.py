"""``graftc demo``: its options, its exit status and its JSON. What the demo does is tested with the demo."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from tests.cli.samples import DEMO
from tests.cli.support import run_here


@pytest.mark.parametrize(("passed", "status"), [(True, 0), (False, 1)])
def test_options_status_and_json(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, passed: bool, status: int
) -> None:
    seen: list[tuple[Path, bool]] = []

    def fake(out: Path, quick: bool = False, console: Console | None = None) -> Any:
        seen.append((out, quick))
        assert console is not None
        console.print("working")
        return SimpleNamespace(passed=passed, to_json=lambda: {**DEMO, "passed": passed})

    monkeypatch.setattr("graftc.runtime.demo.demo.run_demo", fake)
    plain = run_here(capsys, "demo", "--out", "there", "--quick")
    assert (plain.status, plain.out, plain.err) == (status, "working\n", "")
    data = run_here(capsys, "demo", "--json")
    assert data.status == status and data.err == "working\n"
    assert data.data == {**DEMO, "passed": passed, "out": "demo-out", "warnings": []}
    assert seen == [(Path("there"), True), (Path("demo-out"), False)]
