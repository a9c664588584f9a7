"""Precompute, for an exported file, values that adaptations derive only from packed weights and other constants.

DoRA, for example, divides by row norms, which it computes from the whole weight. A file can store these norms as
constants, so that only multiplications read the weight.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.program import Program
from graftc.passes.core.weights.store import Store


def settled(program: Program, store: Store, inputs: Collection[str]) -> tuple[Program, dict[str, Tensor]]:
    """Return a Program that reads such values, if smaller than the weight, as constants, together with the constants.

    The constants are returned by name. If there are none, the Program itself is returned.

    Args:
        program: the Program, which stays unchanged.
        store: the Store that holds all tensors' values and determines which weights are packed.
        inputs: names of tensors that are not constants.
    """
    rewritten, new_constants = program.copy(), dict[str, Tensor]()

    def tensor(name: str) -> Tensor:
        return new_constants[name] if name in new_constants else store.get(name)

    weight_of: dict[fx.Node, fx.Node] = {}
    constant: set[fx.Node] = set()
    for node in rewritten.graph.nodes:
        name = str(node.target)
        if node.op == "get_attr":
            if name not in inputs and name not in store.updated:
                constant.add(node)
            if name in store.packed:
                weight_of[node] = node
        elif node.op == "call_function" and node.all_input_nodes and constant.issuperset(node.all_input_nodes):
            constant.add(node)
            weight = next((weight_of[source] for source in node.all_input_nodes if source in weight_of), None)
            if weight is not None:
                weight_of[node] = weight
    for node in [node for node in rewritten.graph.nodes if node in constant and node in weight_of]:
        weight = weight_of[node]
        value = node.meta.get("val")
        if node is weight or not isinstance(value, Tensor) or constant.issuperset(node.users):
            continue
        if value.numel() >= store.packed[str(weight.target)].numel:
            continue
        path = str(weight.target).rpartition(".")[0]
        name = f"{path}.{node.name}".lstrip(".")
        (new_constants[name],) = computed([node], _none, tensor, store.device(path))
        with rewritten.graph.inserting_before(node):
            read = rewritten.graph.create_node("get_attr", name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
    if not new_constants:
        return program, new_constants
    rewritten.graph.eliminate_dead_code()
    rewritten.edits = rewritten.edits.within(set(rewritten.graph.nodes))
    return rewritten, new_constants


def _none(node: fx.Node) -> Tensor:
    raise AssertionError(f"{node.name} is not a constant")
