"""Detect the roles in a captured transformer from data flow alone: :func:`find_structure`.

A role describes what a weight does in the architecture (``attn.q``, ``ffn.down``, ...). It is derived from where the
weight's output columns go, never from the model's type or the names of its modules. Anything that does not fit is
reported as unresolved, with a reason; nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from contextlib import suppress

from torch import Tensor, fx

from graftc.compiler.roles.assigned_roles import Labels
from graftc.compiler.roles.attention import read_attentions, read_heads
from graftc.compiler.roles.columns import Columns
from graftc.compiler.roles.embeddings_and_heads import read_ends, read_norms, read_tables
from graftc.compiler.roles.feedforward import read_branches
from graftc.compiler.roles.findings import Structure, place
from graftc.compiler.roles.flow import Flow
from graftc.compiler.roles.sublayers import read_sublayers
from graftc.passes.core.elements.ends import last_elements
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import Sizes
from graftc.records.roles import Finding, Sublayer, Unresolved

__all__ = ["Finding", "Structure", "Sublayer", "Unresolved", "find_structure", "place", "roles_of"]

_SMALL = 2


def find_structure(
    graph: fx.Graph,
    constants: Mapping[str, Tensor] | None = None,
    *,
    encoder: bool = False,
    ends: Collection[str] | None = None,
) -> Structure:
    """Return the roles in a canonical graph.

    Args:
        graph: an ATen training IR graph; every node has ``meta["val"]`` (fake tensors, symbolic batch and sequence
            sizes) and ``meta["module"]`` (dotted path of its owning module). The graph is not changed and its weights
            are not read, so a model on ``meta`` is sufficient.
        constants: integer tensors that the graph refers to in addition to the model's own, by name; some models pick
            heads with them. By default none; columns picked by such a tensor are then unresolved.
        encoder: whether the graph contains only a model's encoder; the roles then have the prefix ``encoder.``.
        ends: paths of the elements that may be heads, if the graph is a union of elements; see `last_elements`. None
            for the graph of a whole model.

    Returns:
        The findings in graph order, the weights without a role (each with the reason), and the residual branches.
    """
    columns = _propagate(graph, constants or {})
    labels = Labels(columns.flow, columns, encoder=encoder)
    read_attentions(labels)
    read_branches(labels)
    read_ends(labels, ends)
    read_tables(labels)
    read_norms(labels)
    labels.report_rest()
    return labels.structure(read_sublayers(labels), read_heads(labels))


def roles_of(program: Program, constants: Mapping[str, Tensor] | None = None, *, encoder: bool = False) -> Structure:
    """Return the roles in the base Program of a model, whole or taken apart. Args as for `find_structure`."""
    return find_structure(program.graph, constants, encoder=encoder, ends=last_elements(program))


def _propagate(graph: fx.Graph, constants: Mapping[str, Tensor]) -> Columns:
    """Propagate columns with small sizes, or with the captured sizes if small ones break an operator."""
    tried: list[Columns] = []
    hints = captured_sizes(graph)
    for sizes in (Sizes(lambda _: _SMALL), Sizes(lambda symbol: hints.get(symbol, _SMALL))):
        with suppress(ZeroDivisionError):
            tried.append(Columns(Flow(graph, sizes), constants))
        if tried and not tried[-1].failures:
            break
    return min(tried, key=lambda columns: len(columns.failures))


def captured_sizes(graph: fx.Graph) -> dict[str, int]:
    """Return the sizes with which the graph was captured, by symbol name."""
    for node in graph.nodes:
        mode = getattr(node.meta.get("val"), "fake_mode", None)
        env = getattr(mode, "shape_env", None)
        if env is not None:
            return {str(symbol): int(value) for symbol, value in env.backed_var_to_val.items()}
    return {}
