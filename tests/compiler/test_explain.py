"""Why is this node here? Every printed name has an answer, and the answer agrees with the graph."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AlbertConfig, AlbertForSequenceClassification

import graftc
from graftc.compiler.inspect.explain import explain
from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.printer import Printer, printed_tensor
from graftc.passes.core.ir.program import provenance
from graftc.passes.core.ir.program_key import Mode
from graftc.records.explanation import Below, Explanation
from graftc.testing.families import tiny
from tests.cli.support import check_golden

YAML = """\
version: 1
adapt:
  - name: attention
    method: lora
    target:
      role:
        - attn.q
        - attn.v
      layers: "0:1"
    rank: 4
    dropout: 0.1
  - name: inner
    method: lora
    target: {modules: "**.intermediate.dense"}
train: [classifier]
"""
QUERY = "bert.encoder.layer.0.attention.self.query"


@pytest.fixture(scope="module")
def snapshot(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Snapshot]:
    """A tiny BERT, compiled from a file in the current directory."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("spec"))
    try:
        Path("spec.yaml").write_text(YAML, encoding="utf-8")
        yield graftc.compile("spec.yaml", tiny("bert")).snapshot
    finally:
        os.chdir(before)


def of_family(name: str) -> Snapshot:
    """Return the snapshot of a model; they differ in the owners of nodes and in how often tensors are read."""
    lora = {"method": "lora", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4, "dropout": 0.1}
    if name == "tokens":
        spec: Any = {"adapt": [lora], "tokens": {"add": ["<a>", "<b>"]}}
        return graftc.compile(spec, tiny("gpt2")).snapshot
    if name == "albert":
        config = AlbertConfig(
            vocab_size=101,
            embedding_size=16,
            hidden_size=48,
            num_hidden_layers=3,
            num_attention_heads=4,
            intermediate_size=80,
        )
        return graftc.compile({"adapt": [lora]}, AlbertForSequenceClassification(config).eval()).snapshot
    if name == "trained":
        return graftc.compile({"adapt": [lora], "train": ["classifier"]}, tiny("bert")).snapshot
    return graftc.compile({"adapt": [{**lora, "bias": "all"}]}, tiny(name)).snapshot


@pytest.mark.full
@pytest.mark.parametrize(
    "family",
    ["bert", "tokens", "trained", *(f for f in ("gpt2", "t5", "albert"))],
)
def test_every_name_of_a_graph_has_an_answer_that_agrees_with_it(family: str) -> None:
    snapshot = of_family(family)
    for mode in ("eval", "train"):
        _check_every_name(snapshot, mode)


def _check_every_name(snapshot: Snapshot, mode: Mode) -> None:
    program = snapshot.program(mode)
    printer = Printer(program)
    steps = {entry.step for entry in program.history}
    inserted = 0
    for node in program.graph.nodes:
        name = printer.names[node]
        if node.op == "get_attr":
            for spelling in (name, str(node.target)):
                _check_tensor(explain(snapshot, spelling, mode), snapshot, str(node.target), printer)
            continue
        answer = explain(snapshot, name, mode)
        assert answer.kind == "value" and answer.title == printer.line(node)
        assert answer.to_json() | {"name": ""} == explain(snapshot, name[1:], mode).to_json() | {"name": ""}
        (fact,) = answer.nodes
        assert fact.node == node.name
        assert [v.name for v in fact.reads] == [printer.names[n] for n in node.all_input_nodes if n.op != "get_attr"]
        assert [v.name for v in fact.read_by] == [printer.names[n] for n in node.users]
        origin = provenance(node)
        inserted += origin is not None
        if origin is None:
            assert fact.step == "capture" and not fact.adaptation
            continue
        assert (fact.adaptation, fact.method, fact.part) == (origin["adaptation"], origin["method"], origin["part"])
        assert fact.step in steps
        (why,) = answer.origins
        # A tied tensor is a place under each of its names.
        site = origin["site"].partition("#")[0]
        assert why.adaptation == origin["adaptation"]
        assert why.site in (site, snapshot.aliases.get(site, site))
        if why.kind != "parameter":
            assert why.evidence and why.roles[0].endswith(why.selected_by[0].removeprefix("role "))
            assert why.place.path == "adapt[0].target"
    assert inserted
    json.dumps([explain(snapshot, name, mode).to_json() for name in list(printer.names.values())[:20]], allow_nan=False)


def _check_tensor(answer: Explanation, snapshot: Snapshot, target: str, printer: Printer) -> None:
    if answer.kind == "place":
        assert answer.title == target and target in {t.tensor for t in answer.tensors}
        return
    (tensor,) = answer.tensors
    assert answer.kind == "tensor" and tensor.tensor == target and answer.title == f"{tensor.name}: {tensor.type}"
    assert tensor.trainable == (target in snapshot.adapters and snapshot.adapters[target].trainable)
    (node,) = (n for n in printer.names if n.op == "get_attr" and n.target == target)
    assert [n.name for n in answer.nodes] == [printer.names[user] for user in node.users]
    if ".graftc." in target and ".rows_" not in target:
        assert any(target in origin.tensors for origin in answer.origins)


@pytest.mark.slow
def test_names_of_fx_nodes_unless_something_is_printed_so(snapshot: Snapshot) -> None:
    program = snapshot.program()
    printer = Printer(program)
    printed = set(printer.names.values())
    seen = 0
    for node in program.graph.nodes:
        if f"%{node.name}" in printed:
            continue
        answer = explain(snapshot, node.name)
        seen += 1
        if node.op == "get_attr":
            assert [t.tensor for t in answer.tensors] == [node.target]
        else:
            assert answer.nodes[0].node == node.name
    assert seen > 30


@pytest.mark.slow
def test_an_inserted_value(snapshot: Snapshot) -> None:
    answer = explain(snapshot, "%query.down")
    (why,) = answer.origins
    assert (why.adaptation, why.method, why.site, why.roles) == ("attention", "lora", f"{QUERY}.weight", ("attn.q",))
    assert why.selected_by == ("role attn.q", "layers 0:1")
    assert (why.place.file, why.place.line, why.place.text) == ("spec.yaml", 7, "        - attn.q")
    assert explain(snapshot, "%value.down").origins[0].place.line == 8
    assert [(t.name, t.type, t.trainable) for t in answer.tensors] == [
        (f"@attention.{QUERY}.A", "f32[4, 48]", True),
        (f"@attention.{QUERY}.B", "f32[48, 4]", True),
    ]
    assert [v.name for v in answer.nodes[0].read_by] == ["%query.scale"]
    check_golden("explain_inserted", answer.text())


def test_a_value_of_the_base(snapshot: Snapshot) -> None:
    answer = explain(snapshot, "%query")
    assert answer.nodes[0].step == "capture" and [o.adaptation for o in answer.origins] == ["attention"]
    assert [(v.name, v.adaptation) for v in answer.nodes[0].read_by] == [("%query.add", "attention")]
    assert answer.others == ("%query_1",)
    assert explain(snapshot, "%query_1").others == ()
    assert explain(snapshot, "%query_1").origins == () and explain(snapshot, "%key").origins == ()
    check_golden("explain_base", answer.text())


def test_a_place_has_all_that_is_there(snapshot: Snapshot) -> None:
    answer = explain(snapshot, QUERY)
    assert answer.kind == "place" and [o.site for o in answer.origins] == [f"{QUERY}.weight"]
    assert {n.part for n in answer.nodes} == {"", "down", "scale", "up", "add"}
    assert len(answer.tensors) == 4
    key = explain(snapshot, f"{QUERY}.weight")
    assert key.kind == "place" and key.origins == answer.origins
    assert [n.name for n in key.nodes] == [n.name for n in answer.nodes]
    check_golden("explain_place", answer.text())


def test_a_place_above_others_counts_what_is_below(snapshot: Snapshot) -> None:
    answer = explain(snapshot, "bert.encoder")
    sites = [o.site for o in answer.origins]
    assert len(sites) == 4 and all(site.startswith("bert.encoder.layer.") for site in sites)
    below = [n for n in snapshot.program().graph.nodes if str(n.meta.get("module")).startswith("bert.encoder.")]
    below = [n for n in below if n.op != "get_attr"]
    assert answer.below == Below(len(below), sum(provenance(n) is not None for n in below))
    assert not explain(snapshot, "bert.pooler").origins
    check_golden("explain_above", answer.text())


@pytest.mark.slow
def test_rows_of_a_fused_weight_are_places_of_their_own() -> None:
    snapshot = of_family("gpt2")
    weight = "transformer.h.0.attn.c_attn.weight"
    q, v = (explain(snapshot, f"{weight}[{part}]") for part in "qv")
    assert [o.rows for o in (*q.origins, *v.origins)] == ["0:48", "96:144"]
    assert {n.part for n in q.nodes if n.adaptation} == {n.part for n in v.nodes if n.adaptation}
    assert {n.name for n in q.nodes} & {n.name for n in v.nodes} == {"%c_attn"}
    assert explain(snapshot, weight).kind == "tensor"
    for asked in (weight, "%c_attn", "transformer.h.0.attn.c_attn"):
        assert {o.site for o in explain(snapshot, asked).origins} >= {f"{weight}[q]", f"{weight}[v]"}


@pytest.mark.slow
def test_tensors_under_each_of_their_names(snapshot: Snapshot) -> None:
    factor = f"{QUERY}.graftc.attention.A"
    short, full = (explain(snapshot, name) for name in (printed_tensor(factor), factor))
    assert short.kind == full.kind == "tensor" and short.tensors == full.tensors and short.tensors[0].trainable
    base = explain(snapshot, "@base.classifier.weight")
    assert base.tensors[0].copies == ("@trained.classifier.weight",) and base.nodes == ()
    assert [(o.adaptation, o.step, o.selected_by) for o in base.origins] == [
        ("trained", "insert(train)", ("train classifier",))
    ]
    assert base.origins[0].place.path == "train[0]"
    check_golden("explain_tensor", short.text() + "\n" + base.text())
    tied = explain(of_family("gpt2"), "lm_head.weight")
    assert tied.tensors[0].tensor == "transformer.wte.weight" and tied.tensors[0].aliases == ("lm_head.weight",)


@pytest.mark.full
def test_a_spec_without_a_file_is_named_by_its_path() -> None:
    (why,) = explain(of_family("t5"), "%q.down").origins
    assert (why.place.file, why.place.line, why.place.path) == (None, None, "adapt[0].target")
    assert "adapt[0].target" in explain(of_family("t5"), "%q.down").text()


def test_a_part_of_a_path_is_enough_where_it_is_one_place(snapshot: Snapshot) -> None:
    assert explain(snapshot, "layer.0.query").title == QUERY
    assert explain(snapshot, "pooler").title == "bert.pooler"


@pytest.mark.parametrize(
    ("asked", "mode"),
    [
        ("%quer.down", "eval"),
        ("bert.encoder.layer.0.attention.self.qurey", "eval"),
        ("@attention.bert.encoder.layer.0.attention.self.query.C", "eval"),
        ("self.query", "eval"),
        ("@attention.A", "eval"),
        ("%query.dropout", "eval"),
        ("zzz", "train"),
        ("", "eval"),
    ],
)
def test_what_has_no_answer_says_what_comes_near(snapshot: Snapshot, asked: str, mode: Mode) -> None:
    with pytest.raises(graftc.GraftError) as caught:
        explain(snapshot, asked, mode)
    assert caught.value.code == "GC091"
    slug = "".join(c if c.isalnum() else "_" for c in asked) or "nothing"
    check_golden(f"errors/explain_{slug}", str(caught.value))


@pytest.mark.slow
def test_from_a_compiled_model() -> None:
    compiled = graftc.compile({"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}, tiny("bert"))
    answer = compiled.explain("%query.down")
    assert str(answer) == explain(compiled.snapshot, "%query.down").text()
    assert compiled.explain("%dropout", "train").mode == "train"
