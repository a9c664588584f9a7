"""Conversion between graphs that read packed weights and graphs that read their parts.

A Program reads the weight itself, so that sites, roles and methods see a plain tensor. A graph that is run or exported
reads the parts, and computes the values next to each reader, so that they are kept no longer than the reader needs
them.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from graftc.passes.core.ir.inference import Inference
from graftc.passes.core.ir.new_nodes import insert_call
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ops.unpack import UNPACK, unpacked
from graftc.passes.core.packing.packing import weight_name
from graftc.passes.core.weights.store import Store


def reading_weights(graph: fx.Graph) -> None:
    """Make a captured graph read packed weights instead of computing them from their parts, in place."""
    read: dict[str, fx.Node] = {}
    for node in graph.find_nodes(op="call_function", target=UNPACK):
        parts = node.args[0]
        assert isinstance(parts, list | tuple) and isinstance(parts[0], fx.Node)
        name = weight_name(str(parts[0].target))
        if name not in read:
            with graph.inserting_before(parts[0]):
                read[name] = graph.create_node("get_attr", name, name=weight_name(parts[0].name))
            read[name].meta = {**node.meta, "module": name.rpartition(".")[0]}
        node.replace_all_uses_with(read[name])
        graph.erase_node(node)
        for part in dict.fromkeys(parts):
            if isinstance(part, fx.Node) and not part.users:
                graph.erase_node(part)


def reading_parts(program: Program, store: Store, but: Collection[str] = ()) -> Program:
    """Return a copy of a Program that reads the parts of packed weights, as needed to run or export it.

    A Program that reads no packed weights is returned unchanged.

    Args:
        program: the Program, which is not changed.
        store: the Store, which records the packed weights.
        but: names of packed weights that the copy still reads directly.
    """
    packed = {name: own for name, own in store.packed.items() if name not in but}
    if not any(str(node.target) in packed for node in program.graph.find_nodes(op="get_attr")):
        return program
    result = program.copy()
    graph, types = result.graph, Inference(result)
    for node in list(graph.find_nodes(op="get_attr")):
        name = str(node.target)
        if name not in packed:
            continue
        own, parts = packed[name], []
        for part in own.names(name):
            with graph.inserting_before(node):
                parts.append(graph.create_node("get_attr", part))
            parts[-1].meta = {**node.meta, "val": types.tensor(store.get(part))}
        alone = len(node.users) == 1
        for user in list(node.users):
            read = (parts, own.packing.text, list(own.shape), own.dtype)
            meta = {**node.meta, "module": user.meta.get("module", "")}
            value = insert_call(user, unpacked, read if alone else (*read, False), meta)
            if (custom := user.meta.get("custom")) is not None:
                value.meta["custom"] = dict(custom)
            user.replace_input_with(node, value)
        graph.erase_node(node)
    result.edits = result.edits.within(set(graph.nodes))
    return result
