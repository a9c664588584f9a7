"""Convert a Program to a graph for other tools: networkx, GraphML, DOT.

The result is the same on every run and machine. Nodes have the same names as in the printed text; Store tensors are
nodes as well. An edge goes from a value to its reader and names the argument.
"""

from __future__ import annotations

from typing import Any

import networkx as nx
from torch import fx

from graftc.passes.core.ir.history import positions
from graftc.passes.core.ir.layers import layer_path, repeated_layers
from graftc.passes.core.ir.printer import Printer, format_program, target_name
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.weights.names import module_of
from graftc.records.graphs import GraphEdge, GraphNode, GraphRecord

_PROVENANCE = ("adaptation", "method", "site", "part")
PALETTE = ("#9dc3e6", "#f4b183", "#a9d18e", "#f19ca7", "#c9a6e4", "#ffd966")
"""Fill colours for adaptations, with the same hues as on the pages, assigned in order of appearance, cyclically."""


def to_networkx(program: Program) -> nx.MultiDiGraph[str]:
    """Return the Program as a networkx graph.

    Nodes are keyed by their printed names and have plain attributes: ``order`` in the graph, ``op`` (placeholder,
    get_attr, call_function, output), ``target`` (the operator, or the name of the input or Store tensor), ``type``,
    ``module``, ``text`` (the printed line), and, if an adaptation inserted them, ``adaptation``, ``method``, ``site``
    and ``part``. Edges are keyed by ``position``: the argument's index or keyword, and for a list also a dot and the
    index in the list. There is one edge for each time that a value is read.
    """
    printer = Printer(program)
    graph: nx.MultiDiGraph[str] = nx.MultiDiGraph(entry=program.entry, mode=program.mode)
    for order, node in enumerate(program.graph.nodes):
        graph.add_node(printer.names[node], order=order, **_attributes(node, printer))
    for node in program.graph.nodes:
        for position, source in positions(node.args, node.kwargs):
            graph.add_edge(printer.names[source], printer.names[node], key=position, position=position)
    return graph


def _attributes(node: fx.Node, printer: Printer) -> dict[str, str]:
    attributes = {
        "op": node.op,
        "target": target_name(node.target),
        "type": "" if node.op == "output" else printer.symbols.type(node.meta.get("val")),
        "module": str(node.meta.get("module") or ""),
        "text": f"{printer.names[node]}: {printer.symbols.type(node.meta.get('val'))}"
        if node.op == "get_attr"
        else printer.line(node),
    }
    origin = provenance(node)
    return attributes if origin is None else {**attributes, **{key: origin[key] for key in _PROVENANCE}}


def graph_record(program: Program) -> GraphRecord:
    """Return the graph of `to_networkx` with its canonical text."""
    graph, absent = to_networkx(program), dict.fromkeys(_PROVENANCE)
    nodes = (GraphNode(**{"name": name, **absent, **data}) for name, data in graph.nodes(data=True))
    edges = (GraphEdge(source, target, data["position"]) for source, target, data in graph.edges(data=True))
    return GraphRecord(format_program(program), tuple(nodes), tuple(edges))


def graphml_text(program: Program) -> str:
    """Return the graph of `to_networkx` as GraphML, with the unique edge names that the format requires."""
    named: nx.MultiDiGraph[str] = nx.MultiDiGraph()
    plain = to_networkx(program)
    named.graph.update(plain.graph)
    named.add_nodes_from(plain.nodes(data=True))
    for index, (source, reader, data) in enumerate(plain.edges(data=True)):
        named.add_edge(source, reader, key=f"e{index}", **data)
    return "\n".join(['<?xml version="1.0" encoding="utf-8"?>', *nx.generate_graphml(named, named_key_ids=True)]) + "\n"


def dot_text(program: Program) -> str:
    """Return the Program in Graphviz's DOT language: repeated layers are clusters, and each adaptation has a colour."""
    graph = to_networkx(program)
    layers = repeated_layers(program)
    colours: dict[str, str] = {}
    clusters: dict[str, list[str]] = {"": []}
    for name, data in graph.nodes(data=True):
        if "adaptation" in data:
            colours.setdefault(data["adaptation"], PALETTE[len(colours) % len(PALETTE)])
        layer = layer_path(_home(data))
        clusters.setdefault(layer if layer in layers else "", []).append(_dot_node(name, data, colours))
    lines = [
        f"digraph {_quoted(f'{program.entry} ({program.mode})')} {{",
        "  rankdir=TB;",
        '  node [shape=box, style="rounded,filled", fillcolor=white, fontname="Helvetica", fontsize=10];',
        '  edge [color="#666666"];',
        *(f"  {line}" for line in clusters.pop("")),
    ]
    for index, (layer, members) in enumerate(clusters.items()):
        lines += [f"  subgraph cluster_{index} {{", f"    label={_quoted(layer)};", '    color="#999999";']
        lines += [*(f"    {line}" for line in members), "  }"]
    lines += _legend(colours)
    for source, reader, data in graph.edges(data=True):
        tip = _quoted(f"argument {data['position']}")
        lines.append(f"  {_quoted(source)} -> {_quoted(reader)} [tooltip={tip}];")
    return "\n".join([*lines, "}"]) + "\n"


def _home(data: dict[str, Any]) -> str:
    """Return the module in which a node is drawn; for a tensor, the module that contains it."""
    if data["op"] != "get_attr":
        return str(data["module"]) if data["op"] == "call_function" else ""
    return module_of(str(data["target"]))


def _dot_node(name: str, data: dict[str, Any], colours: dict[str, str]) -> str:
    words = {"placeholder": "input", "get_attr": "tensor", "output": "output"}
    label = "\n".join(text for text in (name, words.get(data["op"], data["target"]), data["type"]) if text)
    marks = {"label": _quoted(label), "tooltip": _quoted(data["text"])}
    if data["op"] == "get_attr":
        marks |= {"shape": "cylinder", "style": "filled", "fillcolor": _quoted("#eeeeee")}
    elif data["op"] in words:
        marks["shape"] = "ellipse"
    if "adaptation" in data:
        marks["fillcolor"] = _quoted(colours[data["adaptation"]])
    return f"{_quoted(name)} [{', '.join(f'{key}={value}' for key, value in marks.items())}];"


def _legend(colours: dict[str, str]) -> list[str]:
    if not colours:
        return []
    lines = ["  subgraph cluster_legend {", '    label="inserted by";']
    for name, colour in colours.items():
        marks = f"label={_quoted(name)}, shape=plaintext, style=filled, fillcolor={_quoted(colour)}"
        lines.append(f"    {_quoted(f'inserted by {name}')} [{marks}];")
    return [*lines, "  }"]


def _quoted(text: str) -> str:
    r"""Return a quoted string in which every character represents itself, except that a line break becomes ``\n``."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'
