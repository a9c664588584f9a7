"""What adaptations compute of packed weights and constants alone, as a constant of the exported file.

DoRA divides by the norms of rows, which it computes of the whole weight: in a file that is made once they are numbers,
and nothing but products reads the weight.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor, fx

from graftc.passes.core.build.base_activations import computed
from graftc.passes.core.ir.program import Program
from graftc.passes.core.weights.store import Store


def settled(program: Program, store: Store, inputs: Collection[str]) -> tuple[Program, dict[str, Tensor]]:
    """A Program that reads such values where they are smaller than the weight, and these by name; the Program itself
    where there are none.

    Args:
        program: stays as it is.
        store: says which weights are packed, and holds their values.
        inputs: names of tensors that are not constants.
    """
    made, found = program.copy(), dict[str, Tensor]()

    def tensor(name: str) -> Tensor:
        return found[name] if name in found else store.get(name)

    weight_of: dict[fx.Node, fx.Node] = {}
    constant: set[fx.Node] = set()
    for node in made.graph.nodes:
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
    for node in [node for node in made.graph.nodes if node in constant and node in weight_of]:
        weight = weight_of[node]
        value = node.meta.get("val")
        if node is weight or not isinstance(value, Tensor) or constant.issuperset(node.users):
            continue
        if value.numel() >= store.packed[str(weight.target)].numel:
            continue
        path = str(weight.target).rpartition(".")[0]
        name = f"{path}.{node.name}".lstrip(".")
        (found[name],) = computed([node], _none, tensor, store.device(path))
        with made.graph.inserting_before(node):
            read = made.graph.create_node("get_attr", name)
        read.meta = dict(node.meta)
        node.replace_all_uses_with(read)
    if not found:
        return program, found
    made.graph.eliminate_dead_code()
    made.edits = made.edits.within(set(made.graph.nodes))
    return made, found


def _none(node: fx.Node) -> Tensor:
    raise AssertionError(f"{node.name} is not a constant")
