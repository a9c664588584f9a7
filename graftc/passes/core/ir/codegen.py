"""Generate code for graphs as functions of a module tree, so that one tree of tensors serves many graphs.

Graphs with equal code share one function object, so that identical layers compile once. Tensors and modules are read
from the modules' own tables, never as attributes, since a model may give its children arbitrary names.
"""

from __future__ import annotations

import hashlib
import itertools
import linecache
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

from graftc.compat.modules import BUFFERS, CHILDREN, PARAMETERS, buffers_of, children_of, parameters_of
from graftc.compat.operators import schema_of
from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.grouped_heads import share_heads
from graftc.passes.core.weights.containers import OWN

Function = Callable[..., Any]
_OF_A_BATCH: dict[Any, Function] = {
    torch.ops.aten.batch_norm.default: nn.functional.batch_norm,
    torch.ops.aten.instance_norm.default: nn.functional.instance_norm,
}
"""Normalisation operators, and the torch functions that replace them where they use their input's statistics.

The functions reject input with a single value per channel, whose statistics are NaN; this is known only at run time.
"""

Value = TypeVar("Value")


class RecentCode:
    """A bounded LRU cache of objects that are generated from graphs and shared by equal graphs.

    Code in use keeps working after its entry is evicted, but later results no longer share it.

    Args:
        most: the maximum number of entries.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._entries: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """Return the value cached under ``key``, created with ``make`` if it is missing."""
        with self._lock:
            if key not in self._entries:
                self._entries[key] = make()
            self._entries.move_to_end(key)
            value: Value = self._entries[key]
            while len(self._entries) > self.most:
                self._entries.popitem(last=False)
        return value


RECENT = RecentCode(512)
"""All code generated in this process. Each signature of a model needs about ten entries of a few kilobytes each."""


@dataclass(frozen=True, eq=False)
class Executable:
    """A graph as code, called as ``executable(tensors, inputs)`` with tensors of any origin; `over` reads a module's.

    Attributes:
        function: a function whose arguments are the tensors, then the layer modules, then the inputs.
        tensors: names of the tensors that it reads, in order.
        layers: paths of the layer modules that it calls, in order.
    """

    function: Function
    tensors: tuple[str, ...]
    layers: tuple[str, ...] = ()

    def __call__(self, tensors: Mapping[str, Tensor], inputs: Sequence[Any]) -> Any:
        """Run a graph that does not call layer modules."""
        return self.function(*(tensors[name] for name in self.tensors), *inputs)

    def over(self, module: nn.Module) -> Function:
        """Return ``f(module, *inputs)``, which reads tensors and layers anew on every call.

        ``f`` may be called with ``module`` or with another module of the same structure.
        """
        values = [_tensor(module, name) for name in self.tensors] + [_module(path) for path in self.layers]
        return RECENT.get((self.function, *values), lambda: _reading(self.function, values))


def executable_of(graph: fx.Graph, device: torch.device) -> Executable:
    """Return the code of a graph.

    Args:
        graph: a graph that names tensors and modules relative to the module on which it will run.
        device: the device of tensors that the graph creates.
    """
    key = _digest(device, [_of_node(node) for node in graph.nodes])
    return RECENT.get(key, lambda: code_of(placed(graph, device)))


def function_of(graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
    """Return ``f(module, *inputs)``, which runs ``graph`` on the tensors under ``module``.

    Args:
        graph: a graph that names tensors relative to the module.
        module: a module on which the function will run; it determines which tensors are parameters and which buffers.
        device: the device of tensors that the graph creates.
    """
    return executable_of(graph, device).over(module)


def _of_node(node: fx.Node) -> tuple[str, ...]:
    """Return everything in a node that affects its code, as text.

    A target is identified by its address, since the code keeps it alive.
    """
    target: Any = node.target if isinstance(node.target, str) else f"{node.target}@{id(node.target)}"
    return node.op, node.name, target, repr(node.args), repr(node.kwargs)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def placed(graph: fx.Graph, device: torch.device) -> fx.Graph:
    """Return a copy of a graph for one device, with the operators that suit that device."""
    result = fx.Graph()
    result.output(result.graph_copy(graph, {}))
    for node in result.nodes:
        if node.op == "call_function" and takes_device(node.target) and not _follows_input(node.target):
            node.kwargs = {**node.kwargs, "device": device}
        if node.op == "call_function" and node.target in _OF_A_BATCH and node.args[5]:
            x, weight, bias, mean, variance, *settings = node.args[:-1]
            node.args = (x, mean, variance, weight, bias, *settings)
            node.target = _OF_A_BATCH[node.target]
        if node.op == "placeholder":
            node.target = node.name  # unique: an input of a model or file may have the same name as a value
    if device.type == "cpu":
        share_heads(result)
    return result


def code_of(graph: fx.Graph) -> Executable:
    """Return the code of a graph that `placed` returned, as `executable_of` does; the graph is consumed."""
    tensors, layers = _read_first(graph)
    graph.set_codegen(_Reading([*tensors.values(), *layers.values()]))
    code = graph.python_code("self", verbose=False)
    key = _digest(code.src, sorted(f"{k}={v!r}@{id(v)}" for k, v in code.globals.items()))
    function = RECENT.get(key, lambda: _compiled(code.src, code.globals))
    return Executable(function, tuple(tensors), tuple(layers))


_numbers = itertools.count()


def _compiled(source: str, names: Mapping[str, Any]) -> Function:
    """Return the function that source code defines; tracebacks show the source while the function exists."""
    filename, scope = f"<graftc {next(_numbers)}>", dict(names)
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    function: Function = scope["forward"]
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function


def _reading(function: Function, values: Sequence[str]) -> Function:
    """Return a function of a module and inputs that passes values of the module, then the inputs, to ``function``.

    ``values`` are source expressions in which the module is called ``self``.
    """
    source = f"def forward(self, *inputs):\n    return function({', '.join([*values, '*inputs'])})\n"
    return _compiled(source, {"function": function})


def _follows_input(target: Any) -> bool:
    """Return whether an operator creates its tensor on the device of one of its inputs by default."""
    return any(isinstance(a.type, torch.TensorType) for a in schema_of(target).arguments)


def call(module: nn.Module, *inputs: Any) -> Any:
    """Call a layer from generated code."""
    own = getattr(module, OWN, None)
    return module(*inputs) if own is None else own.enter(module, *inputs)


class _Reading(fx.graph.CodeGen):
    """Generates functions without ``self`` whose first parameters are tensors and layers.

    Args:
        values: names of these parameters.
    """

    def __init__(self, values: Sequence[str]) -> None:
        super().__init__()
        self._values = values

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """Return the function's first line; the parameters are tensors and layers, then inputs."""
        inputs = [name for name in free_vars if name not in self._values]
        return f"def forward({', '.join([*self._values, *inputs])}){maybe_return_annotation}:"


def _read_first(graph: fx.Graph) -> tuple[dict[str, str], dict[str, str]]:
    """Turn a graph's tensors and modules into parameters; return their parameter names, by tensor name and module path.

    A layer that is called several times becomes a single parameter.
    """
    tensors: dict[str, str] = {}
    layers: dict[str, str] = {}
    start = next(iter(graph.nodes))
    values: dict[str, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("get_attr", "call_module"):
            continue
        table, name = (tensors if node.op == "get_attr" else layers), str(node.target)
        if name not in table:
            with graph.inserting_before(start):
                value = values[name] = graph.placeholder(node.name if table is tensors else f"{node.name}_layer")
            value.target = table[name] = value.name
        value = values[name]
        if node.op == "get_attr":
            node.replace_all_uses_with(value)
        else:
            with graph.inserting_before(node):
                result = graph.call_function(call, (value, *node.args), dict(node.kwargs))
            node.replace_all_uses_with(result)
        graph.erase_node(node)
    return tensors, layers


def _module(path: str) -> str:
    return "self" + "".join(f".{CHILDREN}[{segment!r}]" for segment in path.split(".") if segment)


def _tensor(module: nn.Module, name: str) -> str:
    path, _, last = name.rpartition(".")
    table = PARAMETERS if parameters_of(_owner(module, path)).get(last) is not None else BUFFERS
    return f"{_module(path)}.{table}[{last!r}]"


def tensor_at(module: nn.Module, name: str) -> Tensor:
    """Return the parameter or buffer that generated code reads under a name."""
    path, _, last = name.rpartition(".")
    owner = _owner(module, path)
    parameter = parameters_of(owner).get(last)
    tensor = buffers_of(owner)[last] if parameter is None else parameter
    assert tensor is not None
    return tensor


def _owner(module: nn.Module, path: str) -> nn.Module:
    for segment in path.split(".") if path else ():
        module = children_of(module)[segment]  # type: ignore[assignment]
    return module
