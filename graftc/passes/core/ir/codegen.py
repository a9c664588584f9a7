"""Code for graphs: functions over a module tree, so that one tree of tensors serves many graphs.

Graphs with equal code share one function object: identical layers compile once. Tensors and modules are read from the
tables that modules keep them in, and never as attributes: a model may call its children as it likes.
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

from graftc.passes.core.ir.cleaning import takes_device
from graftc.passes.core.ir.grouped_heads import share_heads
from graftc.passes.core.weights.containers import OWN

Function = Callable[..., Any]
_OF_A_BATCH: dict[Any, Function] = {
    torch.ops.aten.batch_norm.default: nn.functional.batch_norm,
    torch.ops.aten.instance_norm.default: nn.functional.instance_norm,
}
"""Statistics of a single value are NaN, so that torch's functions refuse it: only a graph that runs knows how many."""

Value = TypeVar("Value")


class RecentCode:
    """What has been made of graphs, so that equal ones share it: the most recently used, up to a number of entries.

    Code that a model runs goes on working when it is no longer in here; only what is made later does not share it.

    Args:
        most: how many entries.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self._held: OrderedDict[Hashable, Any] = OrderedDict()
        self._lock = threading.RLock()

    def __len__(self) -> int:
        return len(self._held)

    def get(self, key: Hashable, make: Callable[[], Value]) -> Value:
        """What a key stands for, which is made where it is not there."""
        with self._lock:
            if key not in self._held:
                self._held[key] = make()
            self._held.move_to_end(key)
            found: Value = self._held[key]
            while len(self._held) > self.most:
                self._held.popitem(last=False)
        return found


RECENT = RecentCode(512)
"""All code of this process. A signature of a model takes some ten entries, of a few kilobytes each."""


@dataclass(frozen=True, eq=False)
class Executable:
    """A graph as code: ``executable(tensors, inputs)``, wherever the tensors come from. `over` has a module's own.

    Attributes:
        function: takes tensors, then modules of layers, then inputs.
        tensors: names of those that it reads, in order.
        layers: paths of the modules that it calls, in order.
    """

    function: Function
    tensors: tuple[str, ...]
    layers: tuple[str, ...] = ()

    def __call__(self, tensors: Mapping[str, Tensor], inputs: Sequence[Any]) -> Any:
        """Run a graph without layers of their own."""
        return self.function(*(tensors[name] for name in self.tensors), *inputs)

    def over(self, module: nn.Module) -> Function:
        """``f(module, *inputs)``, which reads the tensors and layers of a module, or of one like it, in every call."""
        values = [_tensor(module, name) for name in self.tensors] + [_module(module, path) for path in self.layers]
        return RECENT.get((self.function, *values), lambda: _reading(self.function, values))


def executable_of(graph: fx.Graph, device: torch.device) -> Executable:
    """The code of a graph.

    Args:
        graph: names tensors and modules relative to what it is to run over.
        device: where tensors are that the graph makes anew.
    """
    key = _digest(device, [_of_node(node) for node in graph.nodes])
    return RECENT.get(key, lambda: code_of(placed(graph, device)))


def function_of(graph: fx.Graph, module: nn.Module, device: torch.device) -> Function:
    """``f(module, *inputs)``, which runs ``graph`` on the tensors under ``module``.

    Args:
        graph: names tensors relative to the module.
        module: one on which the function is to run; it says which tensors are parameters and which are buffers.
        device: where tensors are that the graph makes anew.
    """
    return executable_of(graph, device).over(module)


def _of_node(node: fx.Node) -> tuple[str, ...]:
    """All of a node that code depends on, as text. A target is told by where it is: code holds it."""
    target: Any = node.target if isinstance(node.target, str) else f"{node.target}@{id(node.target)}"
    return node.op, node.name, target, repr(node.args), repr(node.kwargs)


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


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


def code_of(graph: fx.Graph) -> Executable:
    """`executable_of` for what `placed` gives, which is used up."""
    tensors, layers = _read_first(graph)
    graph.set_codegen(_Reading([*tensors.values(), *layers.values()]))
    code = graph.python_code("self", verbose=False)
    key = _digest(code.src, sorted(f"{k}={v!r}@{id(v)}" for k, v in code.globals.items()))
    function = RECENT.get(key, lambda: _compiled(code.src, code.globals))
    return Executable(function, tuple(tensors), tuple(layers))


_numbers = itertools.count()


def _compiled(source: str, names: Mapping[str, Any]) -> Function:
    """A function of its source, which tracebacks show for as long as it is there."""
    filename, scope = f"<graftc {next(_numbers)}>", dict(names)
    exec(compile(source, filename, "exec"), scope)
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    function: Function = scope["forward"]
    weakref.finalize(function, linecache.cache.pop, filename, None)
    return function


def _reading(function: Function, values: Sequence[str]) -> Function:
    """A function of a module and inputs: that of values which are read of the module, as expressions, and inputs."""
    source = f"def forward(self, *inputs):\n    return function({', '.join([*values, '*inputs'])})\n"
    return _compiled(source, {"function": function})


def _follows_input(target: Any) -> bool:
    """Whether the new tensor is where an input is, unless told otherwise."""
    return any(isinstance(a.type, torch.TensorType) for a in target._schema.arguments)


def call(module: nn.Module, *inputs: Any) -> Any:
    """What generated code calls a layer by."""
    own = getattr(module, OWN, None)
    return module(*inputs) if own is None else own.enter(module, *inputs)


class _Reading(fx.graph.CodeGen):
    """Code of a function whose first parameters are tensors and layers, and which has no ``self``.

    Args:
        values: names of these parameters.
    """

    def __init__(self, values: Sequence[str]) -> None:
        super().__init__()
        self._values = values

    def gen_fn_def(self, free_vars: list[str], maybe_return_annotation: str, *, expanded_def: bool = False) -> str:
        """See `torch.fx.graph.CodeGen`."""
        inputs = [name for name in free_vars if name not in self._values]
        return f"def forward({', '.join([*self._values, *inputs])}){maybe_return_annotation}:"


def _read_first(graph: fx.Graph) -> tuple[dict[str, str], dict[str, str]]:
    """Make parameters of a graph's tensors and modules; returns the parameter of each, by names and by paths. Layers
    that are called several times are one."""
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
