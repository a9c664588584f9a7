"""Programs as plain JSON and back: weightless, no pickle, nothing evaluated.

Operators are looked up by name in a closed set of namespaces, classes of outputs among transformers' output classes,
and sizes are parsed by hand, so a file can name nothing else. Names become part of generated code, so they are held
to be names.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from graftc.passes.core.program import HistoryEntry, InputSpec, OutputSpec, Program
from graftc.passes.core.shapes import DTYPE_NAMES, DTYPES, FakeContext, SymbolNames
from graftc.passes.core.updates import updates

SCHEMA = 3
_NAMESPACES = frozenset({"aten", "graftc", "prims", "transformers"})
_HOMES = {"graftc": "graftc.passes.core.ops", "transformers": "transformers.integrations.moe"}
"""Modules that register the operators of a namespace."""

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    f"{module.__name__.lstrip('_')}.{name}": getattr(module, name)
    for module, names in (
        (
            operator,
            ("getitem", "add", "sub", "mul", "floordiv", "mod", "neg", "eq", "ne", "lt", "le", "gt", "ge"),
        ),
        (math, ("ceil", "floor")),
    )
    for name in names
}
_FUNCTION_NAMES = {function: name for name, function in _FUNCTIONS.items()}
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.strided)}
_PATH = re.compile(r"(?!__\w+__(\.|$))[\w -]+(\.(?!__\w+__(\.|$))[\w -]+)*")
_DAMAGE = (
    ArithmeticError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    SyntaxError,
    TypeError,
    ValueError,
)


class SerialisationError(ValueError):
    """A program holds something that has no place in a file."""


def program_to_json(program: Program) -> dict[str, Any]:
    """The whole Program as JSON data.

    Raises:
        SerialisationError: for an operator or argument outside the closed set.
    """
    symbols = SymbolNames(program)
    types: dict[str, int] = {}
    table: list[Any] = []
    index = {node: i for i, node in enumerate(program.graph.nodes)}
    nodes = []
    for node in program.graph.nodes:
        value = _encode_value(node.meta.get("val"), symbols)
        key = repr(value)
        if key not in types:
            types[key] = len(table)
            table.append(value)
        entry = {
            "op": node.op,
            "name": node.name,
            "target": _encode_target(node),
            "args": _encode(node.args, index, symbols),
            "kwargs": {k: _encode(v, index, symbols) for k, v in node.kwargs.items()},
            "type": types[key],
            "module": node.meta.get("module", ""),
        }
        if "custom" in node.meta:
            entry["custom"] = node.meta["custom"]
        nodes.append(entry)
    inputs = [
        {"name": s.name, "dtype": DTYPE_NAMES[s.dtype], "shape": list(s.shape), "ranges": [list(r) for r in s.ranges]}
        for s in program.inputs
    ]
    return {
        "schema": SCHEMA,
        "entry": program.entry,
        "mode": program.mode,
        "flags": [list(flag) for flag in program.flags],
        "inputs": inputs,
        "outputs": _encode_output(program.outputs),
        "updates": sorted(program.updates),
        "history": [[entry.step, entry.added, entry.removed] for entry in program.history],
        "types": table,
        "nodes": nodes,
    }


def program_from_json(data: Mapping[str, Any], device: torch.device) -> Program:
    """The Program of `program_to_json`, with fake values on ``device``.

    Raises:
        SerialisationError: when the data names anything outside the closed set, or is damaged.
    """
    try:
        return _program(data, device)
    except SerialisationError:
        raise
    except _DAMAGE as error:
        raise SerialisationError(f"this is no program: {type(error).__name__}: {error}") from error


def _program(data: Mapping[str, Any], device: torch.device) -> Program:
    if data.get("schema") != SCHEMA:
        raise SerialisationError(f"schema {data.get('schema')} is not {SCHEMA}")
    context = FakeContext()
    values = [_decode_value(value, context, device) for value in data["types"]]
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for entry in data["nodes"]:
        args = _decode(entry["args"], nodes, context)
        kwargs = {_identifier(k): _decode(v, nodes, context) for k, v in entry["kwargs"].items()}
        if entry["op"] == "output":
            node = graph.output(*args)
        else:
            target = _decode_target(entry["op"], entry["target"])
            node = graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        node.meta = {"val": values[entry["type"]], "module": entry["module"]}
        if "custom" in entry:
            node.meta["custom"] = entry["custom"]
        nodes.append(node)
    inputs = tuple(_decode_input(entry) for entry in data["inputs"])
    outputs, flags = _decode_output(data["outputs"]), tuple((str(name), value) for name, value in data["flags"])
    history = [HistoryEntry(str(step), int(added), int(removed), 0.0) for step, added, removed in data["history"]]
    written = frozenset(map(_path, data["updates"])) if "updates" in data else updates(graph)
    return Program(
        graph, inputs, outputs, mode=data["mode"], entry=data["entry"], flags=flags, history=history, updates=written
    )


def _decode_input(data: Mapping[str, Any]) -> InputSpec:
    ranges = tuple((int(low), None if high is None else int(high)) for low, high in data["ranges"])
    return InputSpec(data["name"], DTYPES[data["dtype"]], tuple(data["shape"]), ranges)


def _encode_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return _path(target) if node.op == "get_attr" else target
    if isinstance(target, torch._ops.OpOverload) and target.namespace in _NAMESPACES:
        return f"{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise SerialisationError(f"operator {target} at {node.name}")


def _decode_target(op: str, text: str) -> Any:
    if op == "placeholder":
        return _identifier(text)
    if op == "get_attr":
        return _path(text)
    if text in _FUNCTIONS:
        return _FUNCTIONS[text]
    namespace, _, rest = text.partition(".")
    name, _, overload = rest.rpartition(".")
    if namespace in _HOMES:
        importlib.import_module(_HOMES[namespace])
    if op != "call_function" or namespace not in _NAMESPACES or not name.isidentifier():
        raise SerialisationError(f"operator {text!r}")
    packet = getattr(getattr(torch.ops, namespace), name, None)
    found = getattr(packet, overload, None)
    if not isinstance(found, torch._ops.OpOverload):
        raise SerialisationError(f"operator {text!r}")
    return found


def _path(text: str) -> str:
    """The name of a tensor. Code reads it from a table, but a file has no use for more than words."""
    if not _PATH.fullmatch(text):
        raise SerialisationError(f"tensor {text!r}")
    return text


def _identifier(text: str) -> str:
    if not text.isidentifier() or keyword.iskeyword(text):
        raise SerialisationError(f"name {text!r}")
    return text


def _encode(value: Any, index: Mapping[fx.Node, int], symbols: SymbolNames) -> Any:
    if isinstance(value, fx.Node):
        return {"node": index[value]}
    if isinstance(value, tuple):
        return {"tuple": [_encode(v, index, symbols) for v in value]}
    if isinstance(value, list):
        return [_encode(v, index, symbols) for v in value]
    if isinstance(value, torch.dtype):
        return {"dtype": DTYPE_NAMES[value]}
    if isinstance(value, torch.SymInt):
        return {"size": symbols.size(value)}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if str(value) in _FORMATS and isinstance(value, torch.memory_format | torch.layout):
        return {"format": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise SerialisationError(f"argument {value!r}")


def _decode(value: Any, nodes: list[fx.Node], context: FakeContext) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes, context) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        if inner < 0:
            raise SerialisationError(f"argument {value!r}")
        return nodes[inner]
    if kind == "tuple":
        return tuple(_decode(v, nodes, context) for v in inner)
    if kind == "dtype":
        return DTYPES[inner]
    if kind == "size":
        return context.size(inner)
    if kind == "float":
        return float(inner)
    if kind == "format":
        return _FORMATS[inner]
    raise SerialisationError(f"argument {value!r}")


def _encode_value(value: Any, symbols: SymbolNames) -> Any:
    if isinstance(value, Tensor):
        dtype = DTYPE_NAMES.get(value.dtype)
        if dtype is None:
            raise SerialisationError(f"element type {value.dtype}")
        return {"dtype": dtype, "shape": [symbols.size(size) for size in value.shape]}
    if isinstance(value, list | tuple):
        return [_encode_value(v, symbols) for v in value]
    if value is None or isinstance(value, bool | float):
        return value
    return {"size": symbols.size(value)}


def _decode_value(value: Any, context: FakeContext, device: torch.device) -> Any:
    if isinstance(value, list):
        return [_decode_value(v, context, device) for v in value]
    if not isinstance(value, dict):
        return value
    if "size" in value:
        return context.size(value["size"])
    return context.tensor(DTYPES[value["dtype"]], tuple(value["shape"]), device)


def _encode_output(spec: OutputSpec) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": spec.kind}
    if spec.fields:
        data["fields"] = list(spec.fields)
    if spec.children:
        data["children"] = [_encode_output(child) for child in spec.children]
    if spec.cls is not None:
        data["class"] = f"{spec.cls.__module__}:{spec.cls.__qualname__}"
        if not spec.cls.__module__.startswith("transformers."):
            raise SerialisationError(f"output class {data['class']}")
    return data


def _decode_output(data: Mapping[str, Any]) -> OutputSpec:
    children = tuple(_decode_output(child) for child in data.get("children", ()))
    cls = _output_class(data["class"]) if "class" in data else None
    return OutputSpec(data["kind"], tuple(data.get("fields", ())), children, cls)


def _output_class(text: str) -> type[Any]:
    from transformers.utils.generic import ModelOutput

    module, _, name = text.partition(":")
    if not module.startswith("transformers.") or not name.isidentifier():
        raise SerialisationError(f"output class {text!r}")
    cls = getattr(importlib.import_module(module), name, None)
    if not (isinstance(cls, type) and issubclass(cls, ModelOutput)):
        raise SerialisationError(f"output class {text!r}")
    return cls
