"""Per-pass history and the summary agree with the graphs and the report."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest

import graftc
from graftc.compiler.inspect.history import history
from graftc.compiler.inspect.report import report
from graftc.compiler.inspect.summary import summary
from graftc.passes.core.ir.program import provenance
from graftc.records.graphs import history_columns
from graftc.testing.families import tiny
from tests.kit.models import fresh

SPEC: Any = {
    "adapt": [
        {"method": "lora", "name": "attention", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4, "dropout": 0.1},
        {"method": "lora", "name": "inner", "target": {"role": "ffn.up", "layers": 1}, "init": "pissa"},
    ],
    "train": ["classifier"],
}


@pytest.fixture(scope="module")
def bert() -> Any:
    """A tiny BERT with two adaptations and a trained head."""
    return fresh("bert", **SPEC)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_counts_end_at_the_graph_itself(bert: Any, mode: Any) -> None:
    rows = history(bert.snapshot, mode)
    graph = bert.program(mode).graph
    assert rows[-1].nodes == len(graph.nodes)
    assert rows[-1].inserted == sum(provenance(n) is not None for n in graph.nodes)
    assert rows[0].step == "capture" and rows[0].nodes == rows[0].added
    for before, after in pairwise(rows):
        assert after.nodes == before.nodes + after.added - after.removed
    steps = [row.step for row in rows]
    inserts = ["insert(train)", "insert(attention)", "insert(inner)"]
    assert [s for s in steps if s.startswith("insert")] == inserts
    assert ("mode(eval)" in steps) == (mode == "eval")
    assert "verify" not in steps and all(row.verified for row in rows if row.step in (*inserts, "mode(eval)"))
    for row in rows:
        nodes = [n for n in bert.program("train").graph.nodes if provenance(n) and f"({_owner(n)})" in row.step]
        assert not nodes or row.added == len(nodes)
    json.dumps([row.to_json() for row in rows], allow_nan=False)


def _owner(node: Any) -> str:
    owner = (provenance(node) or {})["adaptation"]
    return "train" if owner == "trained" else str(owner)


def test_times_are_shown_only_where_there_are_any(bert: Any) -> None:
    rows = history(bert.snapshot)
    assert history_columns(rows)[0][-1] == "seconds"
    untimed = tuple(replace(row, seconds=None) for row in rows)
    columns, lines = history_columns(untimed)
    assert columns == ("step", "added", "removed", "nodes", "inserted", "verified")
    assert {len(line) for line in lines} == {len(columns)}


def test_a_program_without_history_is_a_capture(bert: Any) -> None:
    snapshot = bert.snapshot

    def read(mode: Any, base: bool) -> Any:
        return snapshot.read(mode, base).copy(history=[])

    (row,) = history(replace(snapshot, read=read))
    assert (row.step, row.nodes) == ("capture", len(bert.program("train", base=True).graph.nodes))


def test_the_summary_is_what_the_report_says(bert: Any) -> None:
    summarised, counted = summary(bert.snapshot), report(bert.compilation)
    for key in ("base_parameters", "trainable_parameters", "trained_in_full", "percent"):
        assert getattr(summarised, key) == getattr(counted, key)
    assert [
        (a.name, a.method, a.places, a.trainable_parameters, a.frozen_parameters) for a in summarised.adaptations
    ] == [(a.name, a.method, a.sites, a.trainable_parameters, a.frozen_parameters) for a in counted.adaptations]
    attention, inner, trained = summarised.adaptations
    assert (attention.roles, attention.layers, attention.tensors) == (("attn.q", "attn.v"), "0-1", 8)
    assert (inner.roles, inner.layers, inner.tensors) == (("ffn.up",), "1", 4)
    assert (trained.roles, trained.layers, trained.nodes) == ((), "", 0)
    assert summarised.inserted == attention.nodes + inner.nodes and summarised.nodes > summarised.inserted
    assert summarised.base_tensors == len(bert.snapshot.base)
    json.dumps(summarised.to_json(), allow_nan=False)


@pytest.mark.full
def test_layers_of_two_stacks_are_told_apart() -> None:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}], "tokens": {"add": ["<a>"]}}
    tokens, lora = summary(graftc.compile(spec, tiny("t5")).snapshot).adaptations
    assert lora.layers == "encoder.block 0-1, decoder.block 0-1"
    assert (tokens.name, tokens.method, tokens.trainable_parameters) == ("tokens", "tokens", 48)
    assert tokens.nodes > 0
