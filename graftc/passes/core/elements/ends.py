"""Find the elements that may compute the outputs of a model that is split into elements."""

from __future__ import annotations

from graftc.passes.core.elements.calls import elements_in, innermost, input_name
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program import Program


def last_elements(program: Program) -> frozenset[str] | None:
    """Return the elements that are outside the layers and are called after every layer and every part of a layer.

    The graph of a union has an output for each element, but only these elements can compute outputs of the model. If
    the model has no layers, all elements are returned.

    Args:
        program: the graph of a union, with inputs in the order of the calls. For any other graph, None is returned.
    """
    elements = frozenset(elements_in(program.flags))
    if not elements:
        return None
    position = {spec.name: index for index, spec in enumerate(program.inputs)}
    called = {path: position.get(input_name(path, 0), -1) for path in elements}
    modules = {str(node.meta.get("module", "")) for node in program.graph.nodes}
    composite = {innermost(path, elements) for path in modules - elements}
    stacked = {path for path in elements if (layer := layer_path(path)) and (layer != path or path in composite)}
    last = max((called[path] for path in stacked), default=-2)
    return frozenset(path for path in elements - stacked if called[path] > last)
