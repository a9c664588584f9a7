"""Checks of a graph that is about to run and is no longer compared with the base."""

from __future__ import annotations

from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.verify import SIZE_CHOICES, check_types
from graftc.specs.errors.diagnostics import GraftError


def require_runnable(program: Program, step: str) -> None:
    """Check a graph that the pass called ``step`` left.

    Raises:
        GraftError: GC040 if it is not sound, has other inputs or outputs than before, or has a node whose value has
            another type than it says.
    """
    fault = _fault(program)
    if fault:
        raise GraftError("GC040", f"after {step}: {fault}")


def _fault(program: Program) -> str:
    try:
        program.graph.lint()
    except RuntimeError as error:
        return f"the graph is not sound: {error}"
    names = tuple(str(node.target) for node in program.placeholders())
    if names != program.signature:
        return f"the inputs are {names}, they were {program.signature}"
    leaves = program.output_node.args[0]
    count = len(leaves) if isinstance(leaves, tuple) else 1
    if count != len(program.outputs.names):
        return f"{count} outputs, there were {len(program.outputs.names)}"
    untyped = next((n.name for n in program.graph.nodes if n.op == "call_function" and "val" not in n.meta), None)
    if untyped is not None:
        return f"{untyped} does not say the type of its value in meta['val']"
    mismatch = check_types(program, SIZE_CHOICES[0])
    return f"{mismatch[0]}: {mismatch[1]}" if mismatch is not None else ""
