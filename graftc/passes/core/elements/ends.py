"""Which elements a model that is taken apart may end in."""

from __future__ import annotations

from graftc.passes.core.elements.calls import elements_in, innermost, input_name
from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.program import Program


def last_elements(program: Program) -> frozenset[str] | None:
    """Return the single maps that are called when all layers and parts of layers have been: a union of elements has an
    output for every one of them, and only these may be the model's. All where there are no layers.

    Args:
        program: of a union, whose inputs are in the order of the calls; None is returned for a model's own.
    """
    elements = frozenset(elements_in(program.flags))
    if not elements:
        return None
    at = {spec.name: position for position, spec in enumerate(program.inputs)}
    called = {path: at.get(input_name(path, 0), -1) for path in elements}
    modules = {str(node.meta.get("module", "")) for node in program.graph.nodes}
    composite = {innermost(path, elements) for path in modules - elements}
    stacked = {path for path in elements if (layer := layer_path(path)) and (layer != path or path in composite)}
    last = max((called[path] for path in stacked), default=-2)
    return frozenset(path for path in elements - stacked if called[path] > last)
