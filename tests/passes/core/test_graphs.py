"""A Program as a networkx graph, GraphML and DOT: the same nodes and edges as the fx graph, and readable again."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree
from collections import Counter
from typing import Any

import networkx as nx
import pytest
import torch
from torch import fx

import graftc
from graftc.passes.core.ir.graph_formats import dot_text, graph_record, graphml_text, to_networkx
from graftc.passes.core.ir.printer import Printer, format_program
from graftc.passes.core.ir.program import InputSpec, OutputSpec, Program, provenance
from graftc.testing.families import tiny
from tests.kit import warm
from tests.kit.models import fresh

SPEC = {"adapt": [{"method": "lora", "name": "task", "target": {"role": ["attn.q", "attn.v"]}, "dropout": 0.1}]}
aten = torch.ops.aten


@pytest.fixture(scope="module", params=["bert", "gpt2", pytest.param("t5", marks=pytest.mark.slow)])
def adapted_model(request: pytest.FixtureRequest) -> Any:
    """Tiny models with adapted projections: separate ones, fused ones, and those of an encoder and a decoder."""
    return fresh(request.param, **SPEC)


def small(build: Any, inputs: tuple[str, ...] = ("x",)) -> Program:
    """Return a Program over vectors of length 2; ``build`` creates the result from the graph and its inputs."""
    graph = fx.Graph()
    placeholders = [graph.placeholder(name) for name in inputs]
    graph.output((build(graph, *placeholders),))
    for node in graph.nodes:
        if node.op != "output":
            node.meta.setdefault("val", torch.empty(2))
    specs = tuple(InputSpec(name, torch.float32, (2,)) for name in inputs)
    return Program(graph, specs, OutputSpec("tuple", (), (OutputSpec("leaf"),)))


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_it_has_the_nodes_and_edges_of_the_fx_graph(adapted_model: Any, mode: Any) -> None:
    program = adapted_model.program(mode)
    graph = program.to_networkx()
    nodes = list(program.graph.nodes)
    assert isinstance(graph, nx.MultiDiGraph) and len(graph) == len(nodes)
    # Match nodes by their order instead of their names, and collect arguments with fx's own traversal.
    name_of = {data["order"]: name for name, data in graph.nodes(data=True)}
    actual: Counter[tuple[str, str]] = Counter((a, b) for a, b in graph.edges())
    expected: Counter[tuple[str, str]] = Counter()
    for index, node in enumerate(nodes):
        read: list[fx.Node] = []
        fx.node.map_arg((node.args, node.kwargs), read.append)
        expected.update((name_of[nodes.index(source)], name_of[index]) for source in read)
    assert actual == expected
    assert nx.is_directed_acyclic_graph(graph)


def test_nodes_say_what_they_are_in_plain_values(adapted_model: Any) -> None:
    program = adapted_model.program("train")
    graph = to_networkx(program)
    printer = Printer(program)
    lines = set(format_program(program).splitlines())
    inserted = 0
    for node in program.graph.nodes:
        data = graph.nodes[printer.names[node]]
        assert all(type(value) in (str, int) for value in data.values())
        assert data["op"] == node.op and data["module"] == node.meta.get("module", "")
        assert {key: data.get(key) for key in ("adaptation", "method", "site", "part")} == (
            provenance(node) or dict.fromkeys(("adaptation", "method", "site", "part"))
        )
        if node.op == "get_attr":
            assert data["target"] == node.target and printer.names[node].startswith("@")
        else:
            assert data["text"] in lines
        inserted += "adaptation" in data
    assert inserted > 20
    assert {data["adaptation"] for _, data in graph.nodes(data=True) if "adaptation" in data} == {"task"}


def test_edges_say_in_which_argument_a_value_is_read() -> None:
    def build(graph: fx.Graph, x: fx.Node, y: fx.Node) -> fx.Node:
        square = graph.call_function(aten.mul.Tensor, (x, x))
        joined = graph.call_function(aten.cat.default, ([square, y, square], 0))
        return graph.call_function(aten.clamp.Tensor, (joined,), {"min": y})

    graph = to_networkx(small(build, ("x", "y")))
    assert sorted(graph.edges(keys=True)) == [
        ("%cat", "%clamp", "0"),
        ("%clamp", "%output", "0.0"),
        ("%mul", "%cat", "0.0"),
        ("%mul", "%cat", "0.2"),
        ("%x", "%mul", "0"),
        ("%x", "%mul", "1"),
        ("%y", "%cat", "0.1"),
        ("%y", "%clamp", "min"),
    ]


def test_a_module_may_be_called_like_a_numbered_value() -> None:
    """Layers ``ln`` and ``ln_1``, each used twice, give four values with four names."""

    def build(graph: fx.Graph, x: fx.Node) -> fx.Node:
        for module in ("ln", "ln_1", "ln", "ln_1"):
            weight = graph.get_attr(f"{module}.weight")
            x = graph.call_function(aten.mul.Tensor, (x, weight))
            x.meta["module"] = module
        return x

    program = small(build)
    calls = program.graph.find_nodes(op="call_function", target=aten.mul.Tensor)
    assert [Printer(program).names[n] for n in calls] == ["%ln", "%ln_1", "%ln_2", "%ln_1_1"]
    assert [Printer(program, numbered=False).names[n] for n in calls] == ["%ln", "%ln_1", "%ln", "%ln_1"]


def test_graphml_reads_back(adapted_model: Any) -> None:
    program = adapted_model.program()
    graph, text = to_networkx(program), graphml_text(program)
    again = nx.read_graphml(io.BytesIO(text.encode()), force_multigraph=True)
    assert dict(again.nodes(data=True)) == dict(graph.nodes(data=True))
    edges = Counter((a, b, data["position"]) for a, b, data in again.edges(data=True))
    assert edges == Counter((a, b, data["position"]) for a, b, data in graph.edges(data=True))
    assert graphml_text(program.copy()) == text
    ids = [e.get("id") for e in ElementTree.fromstring(text).iter("{http://graphml.graphdrawing.org/xmlns}edge")]
    assert len(ids) == len(set(ids)) == graph.number_of_edges()


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[\w.]+|->|[{}\[\];=,]')


def statements(text: str) -> list[list[str]]:
    """Split a DOT text into statements of tokens; fail on anything that is neither a token nor whitespace."""
    assert not _TOKEN.sub("", text).strip()
    result: list[list[str]] = [[]]
    for token in _TOKEN.findall(text):
        result[-1].append(token)
        if token in ("{", "}", ";"):
            result.append([])
    return [statement for statement in result if statement]


def test_dot_declares_every_node_and_edge_once(adapted_model: Any) -> None:
    program = adapted_model.program()
    graph, text = to_networkx(program), dot_text(program)
    parsed = statements(text)
    assert parsed[0][0] == "digraph" and text.count("{") == text.count("}")
    edges = Counter((s[0][1:-1], s[2][1:-1]) for s in parsed if s[1:2] == ["->"])
    assert edges == Counter((a, b) for a, b in graph.edges())
    declared = Counter(s[0][1:-1] for s in parsed if s[0].startswith('"') and s[1] == "[")
    assert declared - Counter({"inserted by task": 1}) == Counter(dict.fromkeys(graph, 1))
    assert dot_text(program.copy()) == text


@pytest.mark.slow
def test_dot_groups_layers_and_colours_what_was_inserted() -> None:
    program = graftc.compile(SPEC, tiny("bert")).program()
    inside, colours, depth = {}, {}, ""
    for statement in statements(dot_text(program)):
        if statement[0] == "subgraph":
            depth = "?"
        elif statement[0] == "label" and depth:
            depth = statement[2].strip('"')
        elif statement[0] == "}":
            depth = ""
        elif statement[1] == "[":
            name = statement[0].strip('"')
            inside[name] = depth
            colours[name] = statement[statement.index("fillcolor") + 2] if "fillcolor" in statement else ""
    assert set(inside.values()) == {"", "bert.encoder.layer.0", "bert.encoder.layer.1", "inserted by"}
    graph = to_networkx(program)
    own = colours.pop("inserted by task")
    for name, data in graph.nodes(data=True):
        layer = re.match(r"bert\.encoder\.layer\.\d+", data["module"])
        assert inside[name] == (layer.group() if layer else "")
        assert (colours[name] == own) == ("adaptation" in data)


def test_dot_quotes_what_needs_it() -> None:
    text = dot_text(small(lambda graph, x: x, ('a "quoted"\\name',)))
    (node,) = (s for s in statements(text) if s[0].startswith('"%a') and s[1] == "[")
    assert node[0] == r'"%a \"quoted\"\\name"'


def test_plain_data_has_the_same_keys_for_every_node(adapted_model: Any) -> None:
    data = graph_record(adapted_model.program()).to_json()
    assert {tuple(node) for node in data["nodes"]} == {
        ("name", "order", "op", "target", "type", "module", "text", "adaptation", "method", "site", "part")
    }
    assert [node["order"] for node in data["nodes"]] == list(range(len(data["nodes"])))
    names = {node["name"] for node in data["nodes"]}
    assert {edge["source"] for edge in data["edges"]} | {edge["target"] for edge in data["edges"]} <= names


SCRIPT = """
import sys
import graftc
from graftc.passes.core.ir.graph_formats import dot_text, graphml_text
from tests.passes.core.test_graphs import SPEC
from graftc.testing.families import tiny
program = graftc.compile(SPEC, tiny("bert")).program()
print(graphml_text(program) + dot_text(program), end="")
"""


@pytest.mark.full
def test_the_same_in_every_process() -> None:
    program = graftc.compile(SPEC, tiny("bert")).program()
    assert warm.output(SCRIPT, GRAFTC_CACHE="off") == graphml_text(program) + dot_text(program)
