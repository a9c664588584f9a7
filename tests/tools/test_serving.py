"""The tables of docs/serving.md: what a cell says, and that the committed results are what the page promises."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from graftc.runtime.serving.running import DRIVERS
from graftc.specs.errors.diagnostics import CATALOGUE
from tools.serving.__main__ import OTHERS, SEVERAL
from tools.serving.cells import ROUTES, allowed_rank, statuses
from tools.serving.methods import CASES, PROMPTS
from tools.serving.page import END, START, TITLES, cell, render_serving, write_results

DOCS = Path(__file__).parents[2] / "docs"
REFUSED = {"how": "unmerged", "refusal": {"code": "GC066", "message": "no", "way_out": "merge it"}}
SERVED = {"how": "merged", "equal": True, "rows": 5, "changed": 4, "version": "1.2"}
LORA = {**SERVED, "how": "lora", "error": 0.0481, "rank": 40}
WRONG = {**SERVED, "equal": False, "rows": 3}
PLANNED = {**SERVED, "how": "planned", "kind": "graph", "engine": "genai"}


def test_engines_are_the_ones_that_can_be_run() -> None:
    assert set(TITLES) == set(ROUTES) == set(DRIVERS)


@pytest.mark.parametrize(
    ("routes", "text"),
    [
        ([], "not run"),
        ([SERVED], "merged"),
        ([REFUSED, LORA, SERVED], "as LoRA, error 0.048, rank 40; merged"),
        ([REFUSED, LORA, PLANNED], "as LoRA, error 0.048, rank 40"),
        ([REFUSED, {**REFUSED, "how": "merged"}, PLANNED], "refused: [GC066](errors.md#gc066)"),
        ([{**WRONG, "ignored": True, "how": "unmerged"}, SERVED], "unmerged: ignored; merged"),
        ([WRONG], "merged: **3 of 5 rows**; refused: "),
    ],
)
def test_cells(routes: list[dict[str, Any]], text: str) -> None:
    assert cell(routes) == text.removesuffix("; refused: ")


def test_other_tokens_are_failures() -> None:
    """So are tokens of the base, which would be right for an engine that does nothing."""
    assert list(statuses([REFUSED, LORA, SERVED])) == []
    assert list(statuses([WRONG])) == ["merged: 3 rows equal"]
    assert list(statuses([REFUSED, PLANNED])) == []
    assert list(statuses([{**REFUSED, "how": "planned"}])) == ["planned: no"]
    assert list(statuses([{**SERVED, "changed": 0}])) == ["merged: the tokens are the base's"]


@pytest.mark.parametrize(("engine", "rank", "limit"), [("vllm", 9, 16), ("vllm", 512, 512), ("mistralrs", 9, 9)])
def test_limits(engine: str, rank: int, limit: int) -> None:
    assert allowed_rank(engine, rank) == limit and allowed_rank("llama.cpp", rank) is None


def test_a_run_leaves_other_results(tmp_path: Path) -> None:
    """A page is rendered from the file of results, and only between its marks."""
    file, cells = tmp_path / "serving.json", tmp_path / "cells" / "genai"
    file.write_text(json.dumps({"vllm": {"dora": [REFUSED, PLANNED]}, "genai": {"dora": [WRONG]}}))
    cells.mkdir(parents=True)
    (cells / "dora.json").write_text(json.dumps([SERVED]))
    write_results(tmp_path / "cells", file)
    assert json.loads(file.read_text()) == {"vllm": {"dora": [REFUSED, PLANNED]}, "genai": {"dora": [SERVED]}}
    (tmp_path / "serving.md").write_text(f"before\n{START}old\n{END}after\n")
    page = render_serving(tmp_path)
    assert page.startswith("before\n") and page.endswith("after\n") and "old" not in page
    assert "| DoRA | not run | merged | refused: [GC066](errors.md#gc066) |" in page
    assert "| DoRA | vLLM | GC066: no | `graph` in ONNX Runtime GenAI: 5 of 5 rows equal |" in page


def test_committed_results() -> None:
    """Every method ran in every engine, with the right tokens or a refusal that has a code, and a way out that ran."""
    results = json.loads((DOCS / "serving.json").read_text(encoding="utf-8"))
    assert set(results) == set(TITLES)
    for engine, cells in results.items():
        assert set(cells) == {*CASES, *(other for other in OTHERS if other == "whole" or engine in SEVERAL)}
        for name, routes in cells.items():
            assert routes and list(statuses(routes)) == [], (engine, name)
            last = routes[-1]
            assert last["how"] == "planned" or last["how"] in ("unmerged", "at once"), (engine, name)
            assert last["rows"] == last.get("of", len(PROMPTS)) and last["equal"], (engine, name)
            for route in routes:
                refusal = route.get("refusal")
                assert refusal is None or (refusal["code"] in CATALOGUE and refusal["way_out"]), (engine, name)
                assert refusal or route.get("ignored") or route["rows"] == route.get("of", len(PROMPTS)), (engine, name)
