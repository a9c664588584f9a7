"""Capture a model as a Program: ATen training IR with dynamic batch and sequence, canonicalised.

transformers models go through the helpers of ``transformers.exporters`` (an experimental module, so it is used here
and in the exports only); any `nn.Module` goes through ``torch.export`` all the same.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import io
import logging
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn

from graftc.compiler.signature import Axis, default_axes, device_of, tie_sizes
from graftc.passes.canonicalise import canonicalise
from graftc.passes.core.program import HistoryEntry, InputSpec, Mode, OutputSpec, Program
from graftc.specs.diagnostics import GraftError

_REPEAT = re.compile(r"@\d+")


@dataclass
class Capture:
    """A captured Program with the constants it mentions beyond the model's own tensors."""

    program: Program
    constants: dict[str, torch.Tensor] = field(default_factory=dict)
    seconds: float = 0.0
    cached: bool = False
    notes: tuple[str, ...] = ()


def capture(
    model: nn.Module,
    axes: Sequence[Axis] | None = None,
    *,
    mode: Mode = "train",
    canonical: Mapping[str, str] | None = None,
) -> Capture:
    """Capture ``model`` for one signature.

    Args:
        model: any module; its training flags, config and parameters are as before afterwards.
        axes: the inputs; for a transformers model the default is its main input and attention mask.
        mode: capture in train mode (the default) or in eval mode.
        canonical: tied tensor names to the name that owns the tensor.

    Raises:
        GraftError: GC030 when torch.export cannot capture the model.
    """
    chosen = list(axes) if axes is not None else default_axes(model)
    device = device_of(model)
    inputs = {axis.name: axis.example(device) for axis in chosen}
    started = time.perf_counter()
    with ExitStack() as stack:
        stack.enter_context(_mode(model, mode))
        notes = stack.enter_context(_no_layerdrop(model))
        stack.enter_context(_patches(model))
        stack.enter_context(_shared_sizes(model, chosen))
        dynamic = {a.name: {i: torch.export.Dim.AUTO for i in range(len(a.axes))} for a in chosen}
        try:
            with _silence():
                exported = torch.export.export(model, (), copy.deepcopy(inputs), strict=False, dynamic_shapes=dynamic)
        except Exception as error:
            raise GraftError(
                "GC030",
                f"{type(model).__name__} cannot be captured: {_first_line(error)}",
                hint="torch.export must be able to trace the model; value-dependent Python control flow cannot be",
            ) from error
    result = _program(exported, chosen, mode, canonical or {})
    result.seconds = time.perf_counter() - started
    result.notes = tuple(notes)
    return result


@contextmanager
def _silence() -> Iterator[None]:
    """torch prints the graph of a failed capture, and logs and warns besides: the error says it in one line."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


@contextmanager
def _mode(model: nn.Module, mode: Mode) -> Iterator[None]:
    """Set the training flag of every module, and put each one back; configs too, since losses write to them."""
    flags = [(module, module.training) for module in model.modules()]
    config = getattr(model, "config", None)
    saved = dict(vars(config)) if config is not None else {}
    model.train(mode == "train")
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
        if config is not None:
            vars(config).clear()
            vars(config).update(saved)


@contextmanager
def _no_layerdrop(model: nn.Module) -> Iterator[list[str]]:
    """Random skipping of whole layers cannot be captured: it is off while capturing, and reported."""
    touched = [
        (name, module, module.layerdrop)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "layerdrop", None), float) and module.layerdrop > 0
    ]
    for _, module, _ in touched:
        module.layerdrop = 0.0
    try:
        yield [f"layerdrop of {name or 'the model'} is {value} and was captured as 0" for name, _, value in touched]
    finally:
        for _, module, value in touched:
            module.layerdrop = value


@contextmanager
def _patches(model: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if _is_transformers(model):
            from transformers.exporters import exporter_dynamo
            from transformers.exporters.utils import apply_patches

            exporter: Any = exporter_dynamo
            exporter.register_cache_pytrees_for_model(model)
            stack.enter_context(apply_patches("dynamo"))
            stack.enter_context(exporter.reset_model_state(model))
            stack.enter_context(exporter.patch_model_config(model, {"use_cache": False}))
        yield


def _is_transformers(model: nn.Module) -> bool:
    return any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)


@contextmanager
def _shared_sizes(model: nn.Module, axes: Sequence[Axis]) -> Iterator[None]:
    """Give ``forward`` a flat signature of the present inputs, and tell the tracer which sizes are one."""
    original = model.forward
    owned = "forward" in vars(model)

    def forward(**inputs: torch.Tensor) -> Any:
        tie_sizes(axes, inputs)
        return original(**inputs)

    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    forward.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
        [inspect.Parameter(axis.name, kind, default=None) for axis in axes]
    )
    model.forward = forward
    try:
        yield
    finally:
        if owned:
            model.forward = original
        else:
            del model.forward


def _program(
    exported: torch.export.ExportedProgram, axes: Sequence[Axis], mode: Mode, canonical: Mapping[str, str]
) -> Capture:
    module = exported.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, fx.Node] = {}
    for node in module.graph.nodes:
        if node.op == "get_attr":
            target = canonical.get(str(node.target), str(node.target))
            if target in attributes:
                mapping[node] = attributes[target]
                continue
        if node.op == "output":
            leaves = pytree.tree_leaves(node.args[0])
            copied = graph.output(tuple(mapping[n] if isinstance(n, fx.Node) else n for n in leaves))
        else:
            copied = graph.node_copy(node, lambda old: mapping[old])
        mapping[node] = copied
        if node.op == "get_attr":
            copied.target = target
            attributes[target] = copied
        copied.meta = {"val": node.meta.get("val"), "module": _module_path(node)}
    inputs = tuple(InputSpec(axis.name, axis.dtype, axis.axes) for axis in axes)
    spec = exported.call_spec.out_spec
    assert spec is not None
    program = Program(graph, inputs, _output_spec(spec), mode=mode)
    before = len(graph.nodes)
    started = time.perf_counter()
    canonicalise(program)
    seconds = time.perf_counter() - started
    program.history.append(HistoryEntry("canonicalise", 0, before - len(graph.nodes), seconds))
    return Capture(program, _constants(program, module, exported))


def _module_path(node: fx.Node) -> str:
    if node.op == "get_attr":
        return str(node.target).rpartition(".")[0]
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return "" if path.startswith("_empty_nn_module_stack") else _REPEAT.sub("", path)


def _constants(
    program: Program, module: fx.GraphModule, exported: torch.export.ExportedProgram
) -> dict[str, torch.Tensor]:
    """Tensors that the forward made by itself, named by what they hold so that signatures share them."""
    own = set(exported.state_dict) | set(exported.graph_signature.non_persistent_buffers)
    constants: dict[str, torch.Tensor] = {}
    for node in program.graph.find_nodes(op="get_attr"):
        target = str(node.target)
        if target in own:
            continue
        owner, _, name = target.rpartition(".")
        value = getattr(module.get_submodule(owner), name)
        if not isinstance(value, torch.Tensor) or target not in exported.constants:
            continue
        digest = hashlib.sha256(f"{value.dtype}{tuple(value.shape)}".encode())
        if value.device.type != "meta":
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        renamed = f"{owner}.constant_{digest.hexdigest()[:12]}" if owner else f"constant_{digest.hexdigest()[:12]}"
        constants[renamed] = value.detach()
        node.target = renamed
    return constants


def _output_spec(spec: pytree.TreeSpec) -> OutputSpec:
    if spec.is_leaf():
        return OutputSpec("leaf")
    children = tuple(_output_spec(child) for child in spec.children())
    if spec.type in (tuple, list):
        return OutputSpec("tuple" if spec.type is tuple else "list", (), children)
    fields = tuple(str(key) for key in spec.context)
    if spec.type is dict:
        return OutputSpec("dict", fields, children)
    return OutputSpec("class", fields, children, spec.type)
