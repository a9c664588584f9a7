"""The table at the end of a run, and the same as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tools.matrix.making import ReadyEnvironment
from tools.matrix.testing import Outcomes
from tools.matrix.walking import Walked

SHOWN = ("python", "torch", "transformers", "peft", "onnxruntime", "pydantic")
"""The packages whose versions the table shows."""


def row_of_tests(ready: ReadyEnvironment, outcomes: Outcomes) -> dict[str, Any]:
    """Return the entry of the report for the tests in an environment."""
    return {
        "environment": ready.environment.name,
        "versions": dict(sorted(ready.versions.items())),
        "without": dict(ready.environment.without),
        "passed": len(outcomes.passed),
        "failed": len(outcomes.failed),
        "skipped": len(outcomes.skipped),
        "expected failures": len(outcomes.expected),
        "minutes": round(outcomes.seconds / 60, 1),
        "gigabytes": round(ready.bytes / 1e9, 1),
        "failures": dict(sorted(outcomes.failed.items())),
    }


def row_of_walk(ready: ReadyEnvironment, walked: Walked) -> dict[str, Any]:
    """Return the entry of the report for a script."""
    return {
        "script": walked.script,
        "environment": ready.environment.name,
        "versions": dict(sorted(ready.versions.items())),
        "minutes": round(walked.seconds / 60, 1),
        "gigabytes": round(ready.bytes / 1e9, 1),
        "wrong": walked.wrong,
        "left out": dict(walked.left_out),
    }


def table_of_tests(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each environment."""
    counts = ("passed", "failed", "skipped", "minutes", "gigabytes")
    cells = [[row["environment"], *_versions(row), *(str(row[name]) for name in counts)] for row in rows]
    return _table([["environment", *SHOWN, *counts], *cells])


def table_of_walks(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return a table with a line for each script."""
    cells = []
    for row in rows:
        runs = ", ".join(["runs", *(f"without {page}" for page in row["left out"])])
        outcome = row["wrong"].partition("\n")[0] or runs
        cells.append([row["script"], *_versions(row), str(row["minutes"]), str(row["gigabytes"]), outcome])
    return _table([["script", *SHOWN, "minutes", "gigabytes", ""], *cells])


def write_report(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def _versions(row: Mapping[str, Any]) -> list[str]:
    return [row["versions"].get(name, "-") for name in SHOWN]


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
