"""``graftc inspect``: an artifact without its base shows what the live model shows."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx as nx
import pytest

import graftc
from graftc.compiler.inspect.diff import diff
from graftc.compiler.inspect.history import history
from graftc.compiler.inspect.summary import summary
from graftc.passes.core.ir.graph_formats import dot_text, graph_record, graphml_text
from graftc.runtime.artifact import open_artifact
from graftc.testing.families import bert
from tests.cli.support import Outcome, check_golden, run_here, run_warm

SPEC = {
    "adapt": [
        {
            "method": "lora",
            "name": "attention",
            "target": {"role": ["attn.q", "attn.v"]},
            "rank": 4,
            "dropout": 0.1,
        },
    ],
    "train": ["classifier"],
}
VIEWS = ("summary", "graph", "diff", "history", "lowering", "tree", "explanation")


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A compiled model, saved as ``artifact`` in the current folder."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("inspect"))
    compiled = graftc.compile(SPEC, bert())
    compiled.save("artifact", certify=False)
    yield compiled
    os.chdir(before)


def shown(capsys: pytest.CaptureFixture[str], *options: str) -> Outcome:
    """Return the outcome of the command, which must succeed and print nothing to standard error."""
    outcome = run_here(capsys, "inspect", "artifact", *options)
    assert (outcome.status, outcome.err) == (0, "")
    return outcome


@pytest.mark.slow
def test_json_has_every_key_and_what_was_asked_for(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    data = shown(capsys, "--json").data
    assert list(data) == ["artifact", "mode", *VIEWS, "files", "warnings"]
    assert data["artifact"] == "artifact" and data["mode"] == "eval" and data["files"] == data["warnings"] == []
    assert all(data[view] is None for view in VIEWS[1:])


@pytest.mark.full
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_every_view_is_that_of_the_live_model(live: Any, capsys: pytest.CaptureFixture[str], mode: Any) -> None:
    chosen = ["--graph", "--diff", "--history", "--lowering", "--explain", "%query.down_1", "--mode", mode]
    data = shown(capsys, *chosen, "--json").data
    program = live.program(mode)
    assert data["graph"] == graph_record(program).to_json() and data["graph"]["text"] == live.print_graph(mode)
    assert data["diff"] == json.loads(json.dumps(diff(live.program(mode, base=True), program).to_json()))
    assert data["history"] == [{**row.to_json(), "seconds": None} for row in history(live.snapshot, mode, lowered=True)]
    assert data["lowering"] == live.lowering().to_json()
    expected = live.explain("%query.down_1", mode).to_json()
    origin = {}
    for field in ("file", "line", "column", "path", "source"):
        origin[field] = data["explanation"]["origins"][0][field]
    assert data["explanation"] == {**expected, "origins": [{**expected["origins"][0], **origin}]}
    assert Path(origin["file"]) == Path.cwd() / "artifact" / "spec.yaml" and "attn.q" in origin["source"]
    assert origin["line"] == 1 + Path(origin["file"]).read_text(encoding="utf-8").splitlines().index(origin["source"])
    assert origin["path"] == "adapt[0].target.role[0]"
    assert data["tree"] is None


@pytest.mark.slow
def test_tensors_are_in_the_order_of_the_model_and_parameters_are_told_from_buffers(
    live: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shown(capsys, "--tree", "--json").data
    assert data["summary"] == summary(live.snapshot).to_json()
    assert data["tree"] == live.tree().to_json()
    assert shown(capsys, "--tree").out == live.tree().text()
    check_golden("inspect_summary", shown(capsys).out)


@pytest.mark.full
def test_views_as_text(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(capsys, "--graph").out == live.print_graph()
    assert shown(capsys, "--graph", "--mode", "train").out == live.print_graph("train")
    assert shown(capsys, "--diff").out == live.diff()
    check_golden("inspect_diff", shown(capsys, "--diff").out)
    check_golden("inspect_history", shown(capsys, "--history").out)
    explained = shown(capsys, "--explain", "%query.down_1").out
    check_golden("inspect_explain", explained.replace(f"{Path.cwd()}/", ""))
    both = shown(capsys, "--history", "--explain", "%query.down_1").out
    assert both.endswith("\n\n" + explained)


@pytest.mark.slow
def test_files(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    outcome = shown(capsys, "--graphml", "out/a.graphml", "--dot", "a.dot", "--mode", "train")
    assert outcome.out == "wrote out/a.graphml\nwrote a.dot\n"
    text = Path("out/a.graphml").read_text(encoding="utf-8")
    assert text == graphml_text(live.program("train"))
    read = nx.read_graphml(io.BytesIO(text.encode()), force_multigraph=True)
    assert dict(read.nodes(data=True)) == dict(live.program("train").to_networkx().nodes(data=True))
    assert Path("a.dot").read_text(encoding="utf-8") == dot_text(live.program("train"))
    refused = run_here(capsys, "inspect", "artifact", "--dot", "a.dot")
    assert (refused.status, refused.out) == (3, "") and refused.err.startswith("GC063: ")
    assert shown(capsys, "--dot", "a.dot", "--force", "--json").data["files"] == ["a.dot"]
    assert Path("a.dot").read_text(encoding="utf-8") == dot_text(live.program())


@pytest.mark.slow
def test_what_is_wrong_is_told(live: Any, capsys: pytest.CaptureFixture[str]) -> None:
    for options in ((), ("--json",)):
        outcome = run_here(capsys, "inspect", "artifact", "--explain", "%quer.down", *options)
        assert outcome.status == 2
        assert "GC091" in (outcome.out if options else outcome.err)
    assert outcome.data["error"]["hint"] == "did you mean '%query.down' or '%query.down_1' or '%value.down'?"
    assert run_here(capsys, "inspect", "missing", "--json").data["error"]["code"] == "GC080"


@pytest.mark.full
def test_in_another_process(live: Any) -> None:
    outcome = run_warm("inspect", "artifact", "--diff", cwd=Path.cwd())
    assert (outcome.status, outcome.err) == (0, "") and outcome.out == live.diff()
    assert open_artifact("artifact").snapshot.model == "BertForSequenceClassification"
