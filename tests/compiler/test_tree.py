"""The module tree: every tensor once, layers that are alike once, and counts that add up."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

import graftc
from graftc.compiler.inspect.report import report
from graftc.compiler.inspect.tree import model_tree
from graftc.records.tree import TreeNode
from graftc.testing.families import tiny
from tests.cli.support import check_golden

LORA = {"method": "lora", "name": "attention", "target": {"role": ["attn.q", "attn.v"]}, "rank": 4}


def tree(family: str, *adapt: Any, layers: int = 2, **spec: Any) -> TreeNode:
    """Return the tree of a tiny model."""
    count = {"t5": "num_layers", "gpt2": "n_layer"}.get(family, "num_hidden_layers")
    return graftc.compile({"adapt": [*(adapt or [LORA])], **spec}, tiny(family, **{count: layers})).tree()


def nodes(node: TreeNode, times: int = 1) -> Iterator[tuple[TreeNode, int]]:
    """Yield every module with the number of modules that it represents."""
    yield node, times * node.alike
    for child in node.children:
        yield from nodes(child, times * node.alike)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "t5", "vit"])
def test_every_tensor_is_there_and_counts_are_those_of_the_report(family: str) -> None:
    compiled = graftc.compile({"adapt": [LORA]}, tiny(family))
    root, snapshot = compiled.tree(), compiled.snapshot
    assert root == model_tree(snapshot)
    counted = report(compiled.compilation)
    assert (root.base_parameters, root.trainable_parameters) == (
        counted.base_parameters,
        counted.trainable_parameters,
    )
    every = list(nodes(root))
    own = sum(len([t for t in node.tensors if t.tied is None]) * times for node, times in every)
    tied = sum(len([t for t in node.tensors if t.tied is not None]) * times for node, times in every)
    added = sum(len(a.tensors) * times for node, times in every for a in node.added)
    assert (own, tied, added) == (len(snapshot.base), len(snapshot.aliases), len(snapshot.adapters))
    json.dumps(root.to_json(), allow_nan=False)


@pytest.mark.full
def test_alike_layers_are_one_and_counted() -> None:
    root = tree("bert", layers=3, train=["classifier"])
    (layers,) = (node for node, _ in nodes(root) if node.alike > 1)
    assert layers.name == "encoder.layer.0 ... 2: 3 layers alike"
    assert layers.paths == tuple(f"bert.encoder.layer.{i}" for i in range(3))
    assert layers.trainable_parameters == 2 * 2 * 4 * 48
    (query,) = (node for node, _ in nodes(layers) if node.name == "query")
    assert query.roles == ("attn.q",)
    assert list(map(str, query.added)) == ["+ attention (lora): A* f32[4, 48], B* f32[48, 4]"]
    (key,) = (node for node, _ in nodes(layers) if node.name == "key")
    assert not key.roles and not key.added
    check_golden("tree_bert", root.text())


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"overrides": [{"layers": 1, "rank": 2}]}, ["0,2-3: 3 layers alike", "1"]),
        ({"target": {"role": "attn.q", "layers": [0, 2]}}, ["0,2: 2 layers alike", "1,3: 2 layers alike"]),
        ({"target": {"role": "attn.q"}}, ["encoder.layer.0 ... 3: 4 layers alike"]),
    ],
)
def test_layers_that_differ_are_apart(change: Any, names: list[str]) -> None:
    """Another rank, another adaptation, or none sets layers apart."""
    root = tree("bert", LORA | change, layers=4)
    layers = [node for node, _ in nodes(root) if node.paths[0].rpartition(".")[0] == "bert.encoder.layer"]
    assert [node.name for node in layers] == names
    spread = sum(times for node, times in nodes(root) if node.name == "query")
    assert spread == 4


@pytest.mark.full
def test_other_shapes_or_types_are_apart() -> None:
    """T5's first layer has a table of relative positions that the others lack."""
    root = tree("t5", layers=3)
    block = next(node for node, _ in nodes(root) if node.paths == ("encoder.block",))
    assert [child.name for child in block.children] == ["0", "1 ... 2: 2 layers alike"]
    assert block.base_parameters == sum(child.base_parameters * child.alike for child in block.children)


@pytest.mark.slow
def test_fused_rows_ties_buffers_and_frozen_tensors_are_told() -> None:
    root = tree("gpt2", LORA | {"init": "pissa"})
    text = root.text()
    assert "[attn.q rows 0:48, attn.v rows 96:144]" in text
    assert "q.A* f32[4, 48]" in text and "q.A0 f32[4, 48]" in text
    (head,) = (node for node, _ in nodes(root) if node.name == "lm_head")
    assert [t.tied for t in head.tensors] == ["transformer.wte.weight"] and head.base_parameters == 0
    check_golden("tree_gpt2_pissa", text)
    assert "position_ids i64[1, 512] (buffer)" in tree("bert").text()


@pytest.mark.full
def test_trained_rows_say_which() -> None:
    root = tree("gpt2", LORA, tokens={"add": ["<a>", "<b>"]})
    (table,) = (node for node, _ in nodes(root) if node.name == "wte")
    assert list(map(str, table.added)) == ["+ tokens: weight* f32[2, 48] (rows 101:103)"]


@pytest.mark.slow
def test_the_legend_stands_only_where_something_trains() -> None:
    from dataclasses import replace

    snapshot = graftc.compile({"adapt": [LORA]}, tiny("bert")).snapshot
    assert model_tree(snapshot).text().endswith("\n* trains\n")
    bare = replace(snapshot, adapters={}, sites=(), trained=())
    assert "*" not in model_tree(bare).text() and model_tree(bare).trainable_parameters == 0
