"""Capture a model as a Program: canonicalised ATen training IR with dynamic batch and sequence sizes.

transformers models are prepared by the helpers of ``transformers.exporters`` (an experimental module, so it is used
only for capturing and exporting); any other `nn.Module` goes to ``torch.export`` directly.
"""

from __future__ import annotations

import hashlib
import logging
import re
import sys
import time
from collections import namedtuple
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
from torch import fx, nn

from graftc.compat import pytree
from graftc.compat.autocast import regions_without_autocast
from graftc.compat.dynamo import without_call_cache
from graftc.compat.graphs import OUTSIDE_MODULES
from graftc.compat.hooks import none_left_behind
from graftc.compat.operators import HigherOrderOperator
from graftc.compat.transformers import export_patches
from graftc.compiler.capture.alike.modules import Place
from graftc.compiler.capture.alike.repeats import Repeats, numbers_read, traced_once
from graftc.compiler.capture.alike.written import SizesFromDataError, written_once
from graftc.compiler.capture.anchored import Anchor
from graftc.compiler.capture.as_captured import as_captured, called_with, replaced, traced_names
from graftc.compiler.capture.as_traced import kernels_as_chosen
from graftc.compiler.capture.asserted import hold_for_all_values, noted
from graftc.compiler.capture.assignments import noticed
from graftc.compiler.capture.interface import is_transformers
from graftc.compiler.capture.ranges import InputSizes, fixed_notes
from graftc.compiler.capture.refusals import UntraceableError, by_values, in_any_trace, not_captured, require_products
from graftc.compiler.capture.request import CaptureRequest
from graftc.compiler.capture.signature import Axis
from graftc.compiler.input_checks import checks_of
from graftc.compiler.quiet import quiet
from graftc.passes.core import progress
from graftc.passes.core.elements.calls import elements_in
from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.functions import calls, expand, inlined, prune
from graftc.passes.core.ir.history import Recorder
from graftc.passes.core.ir.new_nodes import copy_node
from graftc.passes.core.ir.program import InputSpec, OutputSpec, Program
from graftc.passes.core.ir.shapes import raw_bytes
from graftc.passes.core.ir.updates import updates
from graftc.passes.core.ir.verify import record_baseline
from graftc.passes.graph.canonicalise import canonicalise
from graftc.passes.graph.packed_weights import reading_weights

_REPEAT = re.compile(r"@\d+")
_OF_A_MODEL = re.compile(r"transformers\.models\.\w+\.\w+")
_NUMBER = re.compile(r"_\d+$")


@dataclass
class Capture:
    """A captured Program.

    Attributes:
        traced: the base's graph, in which alike layers are function calls (`graftc.passes.core.ir.functions`).
        constants: tensors that the graph uses in addition to the model's own, by name.
        seconds: the duration of the capture.
        cached: whether it was loaded from a file.
        notes: notes on what capturing had to change.
        key: the key that identifies the model and the request (`graftc.compiler.capture.capture_cache.key`); None if
            there is none.
        assigned: module attributes that the forward pass assigned while it was traced.
        anchor: the comparison with the model itself.
        alike: the number of layer calls that were not traced because the layers are like others.
        read: of the graph of a single element, the integers of its modules that were read while it was traced.
    """

    traced: Program
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False
    notes: tuple[str, ...] = ()
    key: str | None = None
    assigned: tuple[str, ...] = ()
    anchor: Anchor | None = None
    alike: int = 0
    read: tuple[Place, ...] = ()
    flat: Program | None = field(default=None, repr=False)

    @property
    def program(self) -> Program:
        """The base's graph with every layer written out."""
        if self.flat is None:
            written_out = inlined(self.traced)
            self.flat = written_out if written_out is self.traced else record_baseline(written_out)
        return self.flat

    def again(self) -> Capture:
        """Return a copy with its own graph, for another Compilation to rewrite."""
        return replace(self, traced=self.traced.copy(), flat=None)


def capture(request: CaptureRequest, *, alike: bool = True) -> Capture:
    """Capture a model for one signature.

    Args:
        request: the model, and the inputs of its calls.
        alike: whether to trace only one of several alike layers (see `graftc.compiler.capture.alike`); otherwise, all
            are traced.

    Raises:
        GraftError: GC030 if torch.export cannot capture the model.
    """
    started = time.perf_counter()
    try:
        result = _captured(request, alike=alike, hide=True)
    except _SeenError:
        result = _captured(request, alike=alike, hide=False)
    if result is None:
        progress.step(f"capture({request.mode}), every layer")
        result = _captured(request, alike=False, hide=False)
    assert result is not None
    result.seconds = time.perf_counter() - started
    return result


class _SeenError(Exception):
    """Raised if something needed the hidden tensors of a layer."""


def _captured(request: CaptureRequest, *, alike: bool, hide: bool) -> Capture | None:
    """Try to capture once; return None if layers that seemed alike are not, or if anything else prevents reuse.

    Raises:
        _SeenError: if the attempt needs hidden tensors.
    """
    model, axes, inputs, repeats = request.model, request.axes, request.examples(), Repeats()
    once = traced_once(model, inputs if hide else None) if alike else nullcontext(repeats)
    elements = elements_in(request.flags)
    chosen = kernels_as_chosen() if elements else nullcontext()
    asserted: list[str] = []
    with as_captured(request) as notes, _patches(model), chosen:
        try:
            with once as repeats, noticed(model) as assigned, numbers_read(model, elements) as read:
                exported, sizes = _export(model, axes, inputs, repeats, asserted)
                result = _program(exported, sizes.specs(), request.aliases, asserted, repeats)
            require_products(result.traced.graph)
        except SizesFromDataError:
            return None
        except Exception as error:
            if len(repeats.hidden) and not by_values(error):
                raise _SeenError from error
            final = in_any_trace(request, inputs, error)
            if repeats.calls and not final:
                return None
            raise not_captured(request, inputs, error) from (UntraceableError(error) if final else error)
    if repeats.hidden.missed:
        raise _SeenError
    result.alike = repeats.reused
    if assigned and result.alike:
        return None
    result.traced.mode, result.traced.flags = request.mode, request.flags
    result.notes, result.assigned = (*notes, *fixed_notes(axes, result.traced.inputs)), tuple(assigned)
    result.read = tuple(sorted(read))
    return result


def _export(
    model: nn.Module, axes: Sequence[Axis], inputs: Mapping[str, torch.Tensor], repeats: Repeats, asserted: list[str]
) -> tuple[torch.export.ExportedProgram, InputSizes]:
    """Export with every axis as dynamic as possible; repeat with fixed sizes for axes that turn out to be bound."""
    auto, hidden = torch.export.Dim.AUTO, repeats.hidden
    shown = [name for name in inputs if name not in hidden.stand_ins]
    dynamic = {a.name: {i: auto for i in range(len(a.axes)) if _may_vary(a, i)} for a in axes}
    traced = traced_names(shown)
    passed = {axis.name: hidden.stand_ins.get(axis.name, axis.name) for axis in axes}
    while True:
        repeats.restart()
        asserted.clear()
        given = {traced[name]: inputs[name].clone() for name in shown}
        shapes = {traced[name]: dict(dynamic[name]) for name in shown}
        # Caching calls costs more than it saves if sizes are symbols: it takes a fifth to two fifths of a capture.
        unremembered = without_call_cache()
        # Otherwise, the tracer would look up the source line of every node.
        untold = mock.patch.object(fx.config, "do_not_emit_stack_traces", True, create=True)
        with (
            hidden.out_of_sight(),
            replaced(vars(model), "forward", hidden.watched(vars(model)["forward"])),
            called_with(model, {name: traced[source] for name, source in passed.items()}),
            unremembered,
            noted(asserted),
            # torch prints the graph of a failed capture, and also logs and warns; the error states it in one line.
            quiet(["torch"], logging.CRITICAL),
            none_left_behind(),
            untold,
        ):
            exported = torch.export.export(model, (), given, strict=False, dynamic_shapes=shapes)
        nodes = {node.name: node for node in exported.graph.find_nodes(op="placeholder")}
        own = dict(zip(shown, (nodes[name] for name in exported.graph_signature.user_inputs), strict=True))
        sizes = InputSizes(axes, [own[passed[axis.name]] for axis in axes])
        undecided = sizes.undecided()
        if not undecided:
            return exported, sizes
        for name, dims in undecided.items():
            for dim in dims:
                del dynamic[name][dim]


def _may_vary(axis: Axis, dim: int) -> bool:
    """Return whether to request a dynamic axis.

    A size of 0 or 1 is special to the tracer. Patches, windows and strides bind the sizes of images, which takes the
    tracer a minute to find out, so only named axes of an image are dynamic.
    """
    image = axis.dtype.is_floating_point and len(axis.axes) >= 4
    return axis.sizes[dim] > 1 and (isinstance(axis.axes[dim], str) or not image)


@contextmanager
def _patches(model: nn.Module) -> Iterator[None]:
    """Apply the patches that the tracer needs while the block runs."""
    if not is_transformers(model):
        yield
        return
    from transformers.exporters import exporter_dynamo, utils

    exporter: Any = exporter_dynamo
    exporter.register_cache_pytrees_for_model(model)
    checks = mock.patch.object(exporter, "torch_compilable_check", hold_for_all_values)
    with _patches_of_what_is_there(), utils.apply_patches("dynamo"), checks, regions_without_autocast():
        yield


@contextmanager
def _patches_of_what_is_there() -> Iterator[None]:
    """Limit transformers' patches to model code that is already imported, while the block runs.

    Other patches would import more model code.
    """
    if (every := export_patches()) is None:
        yield
        return
    before = every["dynamo"]
    with replaced(every, "dynamo", [patch for patch in before if _is_there(patch[0])]):
        yield


def _is_there(path: str) -> bool:
    """Return whether the module of a model's class is imported; paths outside model code count as imported."""
    model = _OF_A_MODEL.match(path)
    return model is None or model[0] in sys.modules


def _program(
    exported: torch.export.ExportedProgram,
    inputs: tuple[InputSpec, ...],
    canonical: Mapping[str, str],
    asserted: list[str],
    repeats: Repeats,
) -> Capture:
    names = _numbered(exported)
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    written_once(module.graph, repeats, names, [spec.name for spec in inputs])
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}
    specs = iter(inputs)
    called = {one.path for one in calls(module.graph)}  # their tensors are read when the calls are written out
    for node in module.graph.nodes:
        _require_plain(module, node)
        if node.op == "get_attr":
            name = names.get(str(node.target), str(node.target))
            if not node.users and not called.isdisjoint(accumulate(name.split("."), "{}.{}".format)):
                continue
            target = canonical.get(name, name)
            if target in attributes:
                mapping[node] = attributes[target]
                continue
        if node.op == "output":
            leaves = pytree.tree_leaves(node.args[0])
            copied = graph.output(tuple(mapping[n] if isinstance(n, fx.Node) else n for n in leaves))
        elif node.op == "get_attr":
            attributes[target] = copied = graph.create_node("get_attr", target, name=name)
        elif node.op == "placeholder":
            copied = graph.create_node("placeholder", (own := next(specs).name), name=own)
        else:
            copied = copy_node(graph, node, mapping.__getitem__, _NUMBER.sub("", node.name))
        mapping[node] = copied
        path = target.rpartition(".")[0] if node.op == "get_attr" else _module_path(node)
        copied.meta.update(val=node.meta.get("val"), module=path)
    spec = exported.call_spec.out_spec
    assert spec is not None
    program = Program(graph, inputs, output_spec(spec))
    program.checks = checks_of(program, asserted)
    recorder, started = Recorder(graph), time.perf_counter()
    reading_weights(graph)
    canonicalise(program)
    if writes := Memory(graph).writes:
        expand(graph, writes=writes)  # writes have to stay in the order of the layers
    prune(graph)
    seconds = time.perf_counter() - started
    program.updates = updates(graph)
    program.history.append(recorder.entry("canonicalise", graph, seconds))
    return Capture(program, _constants(program, exported, names))


def _require_plain(module: fx.GraphModule, node: fx.Node) -> None:
    """Raise unless a node is a tensor or an operator on values, as opposed to an operator that contains code.

    Raises:
        UntraceableError: naming the operator and the module that calls it.
    """
    if node.op == "get_attr":
        owner, _, name = str(node.target).rpartition(".")
        value = getattr(module.get_submodule(owner), name)
        if isinstance(value, torch.Tensor):
            return
        holder = next(iter(node.users), node)
    elif isinstance(node.target, HigherOrderOperator):
        holder = node
    else:
        return
    stack = list((holder.meta.get("nn_module_stack") or {}).values())
    path, cls = stack[-1] if stack else ("", type(module))
    where = _REPEAT.sub("", str(path)) or "the model"
    of = cls if isinstance(cls, str) else cls.__qualname__
    message = f"{where} ({of.rpartition('.')[2]}) calls {holder.target}, which is not an operator on tensors"
    raise UntraceableError(TypeError(message))


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith(OUTSIDE_MODULES) else _REPEAT.sub("", path)


def _numbered(exported: torch.export.ExportedProgram) -> dict[str, str]:
    """Replace the names of an exported program's tensors with numbered names; return the original names by new name.

    Not every name can be an attribute of a `torch.fx.GraphModule`: ``code`` and ``graph`` are taken, and ``class`` is a
    keyword.
    """
    numbers: dict[str, str] = {}

    def number(name: str) -> str:
        return numbers.setdefault(name, f"tensor_{len(numbers)}")

    signature = exported.graph_signature
    for spec in (*signature.input_specs, *signature.output_specs):
        if spec.target is not None and spec.kind.name not in ("USER_INPUT_MUTATION",):
            spec.target = number(spec.target)
    for table in (exported.state_dict, exported.constants):
        tensors = dict(table)
        table.clear()
        table.update({number(name): value for name, value in tensors.items()})
    return {number: name for name, number in numbers.items()}


def _constants(
    program: Program, exported: torch.export.ExportedProgram, names: Mapping[str, str]
) -> dict[str, torch.Tensor]:
    """Return the tensors that ``forward`` itself created, named by their contents so that signatures share them.

    Equal tensors of one module become one node, as every other tensor has one.
    """
    own = {names[n] for n in (*exported.state_dict, *exported.graph_signature.non_persistent_buffers)}
    values = {names[number]: value for number, value in exported.constants.items()}
    constants: dict[str, torch.Tensor] = {}
    nodes: dict[str, fx.Node] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        owner, point, name = str(node.target).rpartition(".")
        value = values.get(f"{owner}{point}{name}")
        if node.target in own or not isinstance(value, torch.Tensor):
            continue
        digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
        if not value.is_meta:
            digest.update(raw_bytes(value))
        node.target = f"{owner}{point}constant_{digest.hexdigest()[:12]}"
        if (first := nodes.setdefault(node.target, node)) is not node:
            node.replace_all_uses_with(first)
            program.graph.erase_node(node)
        constants[node.target] = value.detach()
    return constants


def output_spec(spec: pytree.TreeSpec) -> OutputSpec:
    """Return the `OutputSpec` that corresponds to pytree's spec of the outputs."""
    if spec.is_leaf():
        return OutputSpec("leaf")
    children = tuple(output_spec(child) for child in spec.children())
    if spec.type in (tuple, list):
        return OutputSpec("tuple" if spec.type is tuple else "list", (), children)
    if spec.type is namedtuple:
        return OutputSpec("class", spec.context._fields, children, spec.context)
    fields = tuple(str(key) for key in spec.context)
    if spec.type is dict:
        return OutputSpec("dict", fields, children)
    return OutputSpec("class", fields, children, spec.type)
