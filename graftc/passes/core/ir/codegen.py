"""Code for graphs: functions over a module tree, so that one tree of tensors serves many graphs.

Graphs with equal code share one function object: identical layers compile once. Tensors and modules are read from the
tables that modules keep them in, and never as attributes: a model may call its children as it likes.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.grouped_heads import share_heads
from graftc.passes.core.weights.containers import OWN

Function = Callable[..., Any]
_OF_A_BATCH: dict[Any, Function] = {
    torch.ops.aten.batch_norm.default: nn.functional.batch_norm,
    torch.ops.aten.instance_norm.default: nn.functional.instance_norm,
}
"""Statistics of a single value are NaN, so that torch's functions refuse it: only a graph that runs knows how many."""

_FUNCTIONS: dict[tuple[str, tuple[str, ...]], Function] = {}
"""By their source, and the objects that it names."""
_KNOWN: dict[tuple[Any, ...], Function] = {}
"""By what the source is made of, so that it is made once for equal layers."""


def function_of(graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
    """``f(module, *inputs)``, which runs ``graph`` on the tensors under ``module``.

    Args:
        graph: names tensors relative to the module.
        module: one on which the function is to run; it says which tensors are parameters and which are buffers.
        device: where tensors are that the graph makes anew.
    """
    key = (device, tuple(_of_node(node, module) for node in graph.nodes))
    if key not in _KNOWN:
        _KNOWN[key] = code_of(placed(graph, device), module)
    return _KNOWN[key]


def _of_node(node: fx.Node, module: nn.Module) -> tuple[Any, ...]:
    """All of a node that code depends on."""
    target: Any = node.target
    if node.op in ("get_attr", "call_module"):
        target = (_module if node.op == "call_module" else _tensor)(module, str(node.target))
    return node.op, node.name, target, repr(node.args), repr(node.kwargs)


def placed(graph: fx.Graph, device: torch.device) -> fx.Graph:
    """A copy of a graph for one device, with the operators that run there."""
    made = fx.Graph()
    output = made.graph_copy(graph, {})
    made.output(output)
    for node in made.nodes:
        if node.op == "call_function" and takes_device(node.target) and not _follows_input(node.target):
            node.kwargs = {**node.kwargs, "device": device}
        if node.op == "call_function" and node.target in _OF_A_BATCH and node.args[5]:
            x, weight, bias, mean, variance, *settings = node.args[:-1]
            node.args = (x, mean, variance, weight, bias, *settings)
            node.target = _OF_A_BATCH[node.target]
        if node.op == "placeholder":
            node.target = node.name  # one of its own: what a model or a file calls an input may be the name of a value
    if device.type == "cpu":
        share_heads(made)
    return made


def code_of(graph: fx.Graph, module: nn.Module) -> Function:
    """`function_of` for what `placed` gives, which is used up."""
    graph.set_codegen(_Reading(_read_first(graph, module)))
    code = graph.python_code("self", verbose=False)
    key = (code.src, tuple(sorted(f"{k}={v!r}" for k, v in code.globals.items())))
    if key not in _FUNCTIONS:
        filename = f"<graftc {len(_FUNCTIONS)}>"
        scope: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, filename, "exec"), scope)
        lines = code.src.splitlines(keepends=True)
        linecache.cache[filename] = (len(code.src), None, lines, filename)
        _FUNCTIONS[key] = scope["forward"]
    return _FUNCTIONS[key]


def _follows_input(target: Any) -> bool:
    """Whether the new tensor is where an input is, unless told otherwise."""
    return any(isinstance(a.type, torch.TensorType) for a in target._schema.arguments)


def call(module: nn.Module, *inputs: Any) -> Any:
    """What generated code calls a layer by."""
    own = getattr(module, OWN, None)
    return module(*inputs) if own is None else own.enter(module, *inputs)


class _Reading(fx.graph.CodeGen):
    """Begins a function by reading what it takes from its module.

    Args:
        values: expressions, by the name of the value that each gives.
    """

    def __init__(self, values: Mapping[str, str]) -> None:
        super().__init__()
        self._values = values

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """See `torch.fx.graph.CodeGen`."""
        inputs = [name for name in free_vars if name not in self._values]
        head = super().gen_fn_def(inputs, maybe_return_annotation, expanded_def=expanded_def)
        return head + "".join(f"\n    {name} = {value}" for name, value in self._values.items())


def _read_first(graph: fx.Graph, module: nn.Module) -> dict[str, str]:
    """Make values that the function begins with of a graph's tensors and modules; returns the expression for each."""
    values: dict[str, str] = {}
    start = next(iter(graph.nodes))
    for node in list(graph.nodes):
        if node.op not in ("get_attr", "call_module"):
            continue
        read = _module if node.op == "call_module" else _tensor
        with graph.inserting_before(start):
            value = graph.placeholder(node.name if node.op == "get_attr" else f"{node.name}_layer")
        value.target = value.name
        values[value.name] = read(module, str(node.target))
        if node.op == "get_attr":
            node.replace_all_uses_with(value)
        else:
            with graph.inserting_before(node):
                result = graph.call_function(call, (value, *node.args), dict(node.kwargs))
            node.replace_all_uses_with(result)
        graph.erase_node(node)
    return values


def _module(module: nn.Module, path: str) -> str:
    return "self" + "".join(f"._modules[{segment!r}]" for segment in path.split(".") if segment)


def _tensor(module: nn.Module, name: str) -> str:
    path, _, last = name.rpartition(".")
    table = "_parameters" if _owner(module, path)._parameters.get(last) is not None else "_buffers"
    return f"{_module(module, path)}.{table}[{last!r}]"


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """The parameter or buffer that code reads by a name."""
    path, _, last = name.rpartition(".")
    owner = _owner(module, path)
    parameter = owner._parameters.get(last)
    found = owner._buffers[last] if parameter is None else parameter
    assert found is not None
    return found


def _owner(module: nn.Module, path: str) -> nn.Module:
    for segment in path.split(".") if path else ():
        module = module._modules[segment]  # type: ignore[assignment]
    return module
