"""The verifier, which runs at every pass boundary by default.

It checks a Program against the base as captured: the graph is well-formed, the interface is unchanged, base nodes are
untouched, every inserted node has a provenance, every replacement keeps shape and dtype, and every trainable tensor has
a gradient path. Once, at the end, all shapes and dtypes are recomputed for two choices of sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import count
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.edits import Edits
from graftc.passes.core.ir.effects import flaw
from graftc.passes.core.ir.gradient_paths import require_gradient_paths
from graftc.passes.core.ir.meta_calls import MetaCalls, plain
from graftc.passes.core.ir.printer import format_around, literal, target_name
from graftc.passes.core.ir.program import Program, provenance
from graftc.passes.core.ir.shapes import Sizes, SymbolNames, expression
from graftc.passes.core.weights.sharding import is_unit
from graftc.passes.core.weights.store import Store
from graftc.specs.errors.diagnostics import GraftError

aten = torch.ops.aten
SIZE_CHOICES = ((2, 3, 5, 7), (5, 7, 3, 2))


def record_baseline(program: Program) -> Program:
    """Record the base's nodes in their current form, against which later passes are checked."""
    names = SymbolNames(program)
    program.baseline = {n.name: _fingerprint(n, names, Edits()) for n in program.graph.nodes if _is_call(n)}
    return program


def verify(program: Program, store: Store, step: str, *, types: bool = False) -> None:
    """Check every invariant after the pass called ``step``.

    Args:
        program: the Program as the pass left it.
        store: the Store that contains its tensors.
        step: the name of the pass, for error messages.
        types: if true, all shapes and dtypes are also recomputed for two choices of sizes.

    Raises:
        GraftError: GC040 naming the pass and the node, with the graph around it; GC030 for shapes that depend on
            tensor values and cannot be recomputed; GC023 for a trainable tensor without a gradient path to an output
            in train mode.
    """
    findings = (rule(program, store) for rule in _RULES)
    finding = _form(program) or next(filter(None, findings), None)
    if finding is not None:
        _fail(program, step, *finding)
    if program.mode == "train":
        require_gradient_paths(program, store)
    if types:
        for sizes in SIZE_CHOICES:
            finding = check_types(program, sizes)
            if finding is not None and _has_sizes_of_values(program):
                hint = "torch.export fixes such sizes; leave out capture: graph to capture each layer as a graph"
                raise GraftError("GC030", f"sizes in the graph depend on tensor values: {finding[1]}", hint=hint)
            if finding is not None:
                _fail(program, step, *finding)


Finding = tuple[fx.Node | None, str]
_LARGEST = 2**63


def _fail(program: Program, step: str, node: fx.Node | None, message: str) -> None:
    where = f" at {node.name}" if node is not None else ""
    details = (format_around(program, node),) if node is not None else ()
    raise GraftError("GC040", f"after {step}{where}: {message}", details=details)


_OF_VALUES = (torch.ops.aten.nonzero.default, torch.ops.aten.masked_select.default)


def _has_sizes_of_values(program: Program) -> bool:
    """Return whether an operator returns a number, or a number of elements, that depends on tensor values."""
    targets = (node.target for node in program.graph.nodes)
    return any(t in _OF_VALUES or torch.Tag.data_dependent_output in getattr(t, "tags", ()) for t in targets)


def _is_call(node: fx.Node) -> bool:
    return node.op == "call_function"


def require_runnable(program: Program, step: str) -> None:
    """Check a graph that is ready to run after the pass called ``step`` and is no longer compared with the base.

    Raises:
        GraftError: GC040 if it is malformed, if its inputs or outputs have changed, or if a node's value does not have
            the declared shape and dtype.
    """
    fault = _fault(program)
    if fault:
        raise GraftError("GC040", f"after {step}: {fault}")


def _fault(program: Program) -> str:
    finding = _form(program)
    if finding is not None:
        return finding[1]
    untyped = next((node.name for node in program.graph.nodes if _is_call(node) and "val" not in node.meta), None)
    if untyped is not None:
        return f"{untyped} has no meta['val']"
    mismatch = check_types(program, SIZE_CHOICES[0])
    return f"{mismatch[0]}: {mismatch[1]}" if mismatch is not None else ""


def _form(program: Program) -> Finding | None:
    try:
        program.graph.lint()
    except RuntimeError as error:
        return None, f"the graph is malformed: {error}"
    names = tuple(str(node.target) for node in program.placeholders())
    if names != program.signature:
        return None, f"the inputs must be {program.signature}, got {names}"
    leaves = program.output_node.args[0]
    count = len(leaves) if isinstance(leaves, tuple) else 1
    if count != len(program.outputs.names):
        return program.output_node, f"the graph must have {len(program.outputs.names)} outputs, got {count}"
    return None


def _tensors_stored(program: Program, store: Store) -> Finding | None:
    for node in program.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in store:
            return node, f"{name} is not in the Store"
        stored, value = store.get(name), node.meta.get("val")
        same = isinstance(value, Tensor) and tuple(value.shape) == tuple(stored.shape)
        # FSDP2 stores parameters in one floating-point dtype and computes in another.
        cast = same and is_unit(store.root) and value.is_floating_point() and stored.is_floating_point()
        if not same or not (cast or value.dtype == stored.dtype):
            return node, f"{name} is {stored.dtype} {list(stored.shape)} in the Store, but not in the graph"
    return None


def _inputs_first(program: Program, store: Store) -> Finding | None:
    computed = next((node for node in program.graph.nodes if _is_call(node)), None)
    if computed is not None and any(node > computed for node in program.placeholders()):
        return computed, "it comes before an input"
    return None


def _effects(program: Program, store: Store) -> Finding | None:
    return flaw(program.graph, program.mode, store.is_buffer)


def _base_untouched(program: Program, store: Store) -> Finding | None:
    names = SymbolNames(program)
    own = 0
    for node in program.graph.nodes:
        if not _is_call(node) or provenance(node) is not None:
            continue
        own += 1
        expected = program.baseline.get(node.name)
        if expected is None:
            return node, "an inserted node has no provenance"
        if _fingerprint(node, names, program.edits) != expected:
            return node, "a node of the base was changed"
    if own != len(program.baseline):
        present = {node.name for node in program.graph.nodes}
        missing = [name for name in program.baseline if name not in present]
        return None, f"nodes of the base are missing: {', '.join(missing[:3])}"
    return None


def _fingerprint(node: fx.Node, names: SymbolNames, edits: Edits) -> tuple[Any, ...]:
    """Return a node's target and arguments, with every replacement traced back to the original node."""

    def text(source: fx.Node) -> str:
        return edits.original(source).name

    arguments = literal(node.args, text, names), literal(dict(node.kwargs), text, names)
    return (target_name(node.target), *arguments)


def _edits_keep_types(program: Program, store: Store) -> Finding | None:
    for edit in program.edits:
        a, b = edit.before.meta["val"], edit.after.meta["val"]
        same = a.dtype == b.dtype and len(a.shape) == len(b.shape)
        if not same or any(expression(x) != expression(y) for x, y in zip(a.shape, b.shape, strict=True)):
            return (
                edit.after,
                f"{edit.adaptation!r} replaced {a.dtype} {list(a.shape)} with {b.dtype} {list(b.shape)}",
            )
    return None


_RULES: tuple[Callable[[Program, Store], Finding | None], ...] = (
    _tensors_stored,
    _inputs_first,
    _base_untouched,
    _edits_keep_types,
    _effects,
)


def check_types(program: Program, choice: tuple[int, ...], *, strict: bool = False) -> Finding | None:
    """Run the graph on the meta device with concrete sizes, and check every value's shape and dtype.

    Args:
        program: the Program to check.
        choice: integers to assign to the symbols.
        strict: if true, the base's own nodes are checked as well, except those that depend on tensor values.
    """
    numbers, assigned, ranges = count(), {}, _ranges(program)
    given = {str(symbol) for symbol in SymbolNames(program).symbols}

    def assign(symbol: str) -> int:
        if symbol not in assigned:
            # Symbols that occur in no input, such as the number of rows selected by the data, are free, but
            # graphs divide them by other sizes.
            free = choice[next(numbers) % len(choice)] if symbol in given else math.prod(choice)
            low, high = ranges.get(symbol, (0, None))
            free = free if free >= low else low + free
            assigned[symbol] = free if high is None else min(free, high)
        return assigned[symbol]

    calls = MetaCalls(Sizes(assign))
    for node in program.graph.nodes:
        if not _is_call(node):
            if node.op != "output":
                calls.values[node] = calls.concrete(node.meta["val"])
            continue
        inserted = provenance(node) is not None
        expected, call = calls.concrete(node.meta["val"]), calls.outcome(node)
        if call.mixed and (strict or inserted):
            return node, f"it multiplies tensors of different dtypes: {call.mixed}"
        if call.error is not None:
            if inserted or (strict and not _depends_on_values(node, call.error)):
                return node, f"it does not run on the meta device: {call.error}"
            calls.values[node] = expected
            continue
        calls.values[node] = result = call.result
        if type(result) is int and abs(result) >= _LARGEST:
            return node, "it returns an integer that does not fit in 64 bits"
        if not calls.alike(result, expected):
            return node, f"it returns {plain(result)}, but the graph declares {plain(expected)}"
    return None


def _ranges(program: Program) -> dict[str, tuple[int, int | None]]:
    """Return the minimum and maximum of each symbol of the inputs."""
    ranges: dict[str, tuple[int, int | None]] = {}
    for node, spec in zip(program.placeholders(), program.inputs, strict=False):
        value = node.meta["val"]
        for size, bounds in zip(value.shape if isinstance(value, Tensor) else (), spec.ranges, strict=False):
            ranges.setdefault(str(expression(size)), bounds)
    return ranges


def _depends_on_values(node: fx.Node, error: Exception) -> bool:
    """Return whether a call fails on the meta device only because it needs values or is not implemented there."""
    target = node.target
    tags = target.tags if isinstance(target, torch._ops.OpOverload) else ()
    return (
        isinstance(error, NotImplementedError)
        or torch.Tag.data_dependent_output in tags
        or torch.Tag.dynamic_output_shape in tags
    )
