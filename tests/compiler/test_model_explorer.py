"""Graphs for Model Explorer: the format, every node and edge, groups and colours, and malicious names."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from jsonschema import Draft202012Validator
from torch import nn

import graftc
from graftc.compiler.inspect.model_explorer import NAME, TEXT, model_explorer, model_explorer_text
from graftc.passes.core.ir.graph_formats import to_networkx
from graftc.runtime.artifact import open_artifact
from tests.kit.models import fresh

SPEC = {
    "adapt": [
        {"method": "lora", "name": "attention", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4},
        {"method": "ia3", "name": "feed", "target": {"role": "ffn.down"}},
    ],
    "train": ["classifier"],
}
_PAIRS = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["key", "value"],
        "additionalProperties": False,
        "properties": {"key": {"type": "string"}, "value": {"type": "string"}},
    },
}
_METADATA = {
    "type": "array",
    "items": {
        "type": "object",
        "required": ["id"],
        "additionalProperties": False,
        "properties": {"id": {"type": "string"}, "attrs": _PAIRS},
    },
}
_EDGE_FIELDS = ("sourceNodeId", "sourceNodeOutputId", "targetNodeInputId")
SCHEMA = {
    "type": "object",
    "required": ["label", "graphs"],
    "additionalProperties": False,
    "properties": {
        "label": {"type": "string"},
        "graphSorting": {"enum": ["node_count_asc", "node_count_desc", "name_asc", "name_desc"]},
        "graphs": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["id", "nodes"],
                "additionalProperties": False,
                "properties": {
                    "id": {"type": "string"},
                    "groupNodeAttributes": {
                        "type": "object",
                        "additionalProperties": {"type": "object", "additionalProperties": {"type": "string"}},
                    },
                    "groupNodeConfigs": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["namespaceRegex"],
                            "additionalProperties": False,
                            "properties": {
                                "namespaceRegex": {"type": "string"},
                                "backgroundColor": {"type": "string", "pattern": "^#[0-9a-f]{6}$"},
                            },
                        },
                    },
                    "nodes": {
                        "type": "array",
                        "items": {
                            "type": "object",
                            "required": ["id", "label", "namespace"],
                            "additionalProperties": False,
                            "properties": {
                                "id": {"type": "string", "minLength": 1},
                                "label": {"type": "string", "minLength": 1},
                                "namespace": {"type": "string"},
                                "attrs": _PAIRS,
                                "incomingEdges": {
                                    "type": "array",
                                    "items": {
                                        "type": "object",
                                        "required": ["sourceNodeId"],
                                        "additionalProperties": False,
                                        "properties": {field: {"type": "string"} for field in _EDGE_FIELDS},
                                    },
                                },
                                "inputsMetadata": _METADATA,
                                "outputsMetadata": _METADATA,
                                "style": {
                                    "type": "object",
                                    "additionalProperties": False,
                                    "properties": {"backgroundColor": {"pattern": "^#[0-9a-f]{6}$"}},
                                },
                            },
                        },
                    },
                },
            },
        },
    },
}
"""The format as ``graph_builder.py`` of ai-edge-model-explorer 0.1.34 and ``input_graph.ts`` document it."""


@pytest.fixture(scope="module")
def bert() -> Any:
    return fresh("bert", **SPEC)


@pytest.fixture(scope="module")
def data(bert: Any) -> Any:
    return model_explorer(bert.snapshot)


def check(data: Any) -> None:
    """Check the format, that ids are unique, and that edges come from other nodes of the same graph."""
    Draft202012Validator(SCHEMA).validate(data)
    for graph in data["graphs"]:
        ids = [node["id"] for node in graph["nodes"]]
        assert len(set(ids)) == len(ids)
        for node in graph["nodes"]:
            edges = node["incomingEdges"]
            assert {edge["sourceNodeId"] for edge in edges} <= set(ids) - {node["id"]}
            assert [e["targetNodeInputId"] for e in edges] == [m["id"] for m in node["inputsMetadata"]]


@pytest.mark.full
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_nodes_and_edges_are_those_of_both_graphs(bert: Any, mode: Any) -> None:
    data = model_explorer(bert.snapshot, mode)
    check(data)
    assert [graph["id"] for graph in data["graphs"]] == [f"adapted ({mode})", f"base ({mode})"]
    for graph, base in zip(data["graphs"], (False, True), strict=True):
        plain = to_networkx(bert.program(mode, base=base))
        assert [node["id"] for node in graph["nodes"]] == list(plain)
        edges = [(e["sourceNodeId"], node["id"]) for node in graph["nodes"] for e in node["incomingEdges"]]
        assert sorted(edges) == sorted(plain.edges())
        for node in graph["nodes"]:
            attributes = {pair["key"]: pair["value"] for pair in node["attrs"]}
            known = plain.nodes[node["id"]]
            assert attributes.get("type", "") == known["type"]
            for key in ("method", "site", "part"):
                assert attributes.get(key) == known.get(key)
            if known["op"] == "call_function":
                assert node["namespace"].split("/+ ")[0].replace("/", ".") == known["module"]


@pytest.mark.slow
def test_an_artifact_gives_the_same_as_the_live_model(bert: Any, tmp_path: Path) -> None:
    bert.save(tmp_path / "artifact", certify=False)
    text = model_explorer_text(open_artifact(tmp_path / "artifact").snapshot)
    assert text == model_explorer_text(bert.snapshot) and json.loads(text)["graphs"]


@pytest.mark.slow
def test_each_adaptation_has_a_colour_and_groups_of_its_own(data: Any) -> None:
    adapted, base = data["graphs"]
    groups = [(re.compile(c["namespaceRegex"]), c["backgroundColor"]) for c in adapted["groupNodeConfigs"]]
    seen: dict[str, set[str]] = {}
    for node in adapted["nodes"]:
        attributes = {pair["key"]: pair["value"] for pair in node["attrs"]}
        owner = attributes.get("adaptation")
        matching = [colour for pattern, colour in groups if pattern.search(node["namespace"])]
        if owner is None:
            assert not matching
            continue
        assert node["namespace"].endswith(f"+ {owner}") and matching == [node["style"]["backgroundColor"]]
        seen.setdefault(owner, set()).update(matching)
    assert {"attention", "feed"} <= seen.keys() and all(len(colours) == 1 for colours in seen.values())
    assert len({colour for colours in seen.values() for colour in colours}) == len(seen)
    assert not any("+ " in node["namespace"] for node in base["nodes"]) and "groupNodeConfigs" not in base
    attributes = adapted["groupNodeAttributes"]
    own = attributes["bert/encoder/layer/1/attention/self/query"]
    assert own == {"attention: weight": "lora, attn.q, layer 1"}
    spaces = {node["namespace"] for node in adapted["nodes"]}
    assert all(any(space.startswith(group) for space in spaces) for group in attributes)


def test_edges_say_which_of_several_outputs(bert: Any) -> None:
    """A node that takes an item out of a tuple reads that output, and the tuple has metadata for each."""

    class Halves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            one, two = torch.ops.aten.split.Tensor(self.inner(x), 3, -1)
            product: torch.Tensor = one * two.relu()
            return product

    spec = {"adapt": [{"method": "lora", "target": {"modules": "inner"}, "rank": 2}]}
    halves = graftc.compile(spec, Halves(), example_inputs={"x": torch.zeros(2, 6)})
    data = model_explorer(halves.snapshot)
    check(data)
    nodes = {node["id"]: node for node in data["graphs"][0]["nodes"]}
    several = next(node for node in nodes.values() if len(node["outputsMetadata"]) == 2)
    taken = [e for n in nodes.values() for e in n["incomingEdges"] if e["sourceNodeId"] == several["id"]]
    assert sorted(e["sourceNodeOutputId"] for e in taken) == ["0", "1"]


HOSTILE = ('<script>alert("1")</script>', "a/b;c", "x" * 10_000, "\u202eevil\x1b[31m", "${`'\\")


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_that_mean_harm(name: str) -> None:
    """No name splits a namespace, controls a terminal or is endless; patterns match what they are for."""

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inner = nn.Module()
            self.add_module(name, inner)
            inner.add_module("leaf", nn.Linear(4, 4))
            inner.add_module("leaf2", nn.Linear(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            child = getattr(self, name)
            return child.leaf2(child.leaf(x).relu())  # type: ignore[no-any-return]

    spec = {"adapt": [{"method": "lora", "target": {"regex": ".*leaf"}, "rank": 2}]}
    model = graftc.compile(spec, Holder(), example_inputs={"x": torch.zeros(2, 4)})
    text = model_explorer_text(model.snapshot)
    data = json.loads(text)
    check(data)
    assert text.isascii() and "\x1b" not in json.dumps(data, ensure_ascii=False)
    adapted = data["graphs"][0]
    inner = {n["namespace"].split("/")[1] for n in adapted["nodes"] if n["namespace"].count("/") >= 1}
    assert inner == {"leaf", "leaf2"}, "the hostile name is one segment"
    assert all(";" not in node["namespace"] for node in adapted["nodes"])
    assert max(len(node["id"]) for node in adapted["nodes"]) <= NAME + 10
    assert max(len(pair["value"]) for node in adapted["nodes"] for pair in node["attrs"]) <= TEXT
    (config,) = adapted["groupNodeConfigs"]
    assert any(re.search(config["namespaceRegex"], node["namespace"]) for node in adapted["nodes"])


def _read(kind: Any, value: Any) -> Any:
    """Convert a value to the type of a dataclass field, strictly."""
    if get_origin(kind) in (Union, type(int | None)):
        for choice in get_args(kind):
            try:
                return _read(choice, value)
            except TypeError:
                continue
        raise TypeError(f"{value!r} is no {kind}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict):
            raise TypeError(f"{value!r} is no {kind}")
        hints = get_type_hints(kind)
        return kind(**{name: _read(hints[name], item) for name, item in value.items()})  # type: ignore[operator]
    if get_origin(kind) is list:
        return [_read(get_args(kind)[0], item) for item in value]
    if get_origin(kind) is dict:
        return {_read(get_args(kind)[0], k): _read(get_args(kind)[1], v) for k, v in value.items()}
    if isinstance(kind, type) and not isinstance(value, kind):
        raise TypeError(f"{value!r} is no {kind}")
    return value


@pytest.mark.slow
def test_the_package_of_model_explorer_reads_it(data: Any) -> None:
    """Its own classes accept every field; of `pip install ai-edge-model-explorer`, only one file is used."""
    package = PathFinder.find_spec("model_explorer")
    if package is None or not package.submodule_search_locations:
        pytest.skip("ai-edge-model-explorer is not installed")
    file = Path(package.submodule_search_locations[0]) / "graph_builder.py"
    loading = importlib.util.spec_from_file_location("model_explorer_graph_builder", file)
    assert loading is not None and loading.loader is not None
    builder = importlib.util.module_from_spec(loading)
    sys.modules[loading.name] = builder
    try:
        loading.loader.exec_module(builder)
        collection = _read(builder.GraphCollection, data)
    finally:
        del sys.modules[loading.name]
    assert dataclasses.asdict(collection)["label"] == "BertForSequenceClassification by graftc"
    assert [len(g.nodes) for g in collection.graphs] == [len(g["nodes"]) for g in data["graphs"]]
