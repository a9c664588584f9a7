"""Convert Programs to plain JSON and back: no weights, no pickle, no evaluated code.

A file can only name operators from a literal list and output classes of transformers' own models, and sizes are read
by a dedicated parser. Names become part of generated code, so they are validated as identifiers. The result is a
complete Program with consistent shapes and dtypes, whose operators accept their arguments and whose writes are all
allowed; anything else is rejected.
"""

from __future__ import annotations

import importlib
import keyword
import math
import operator
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, fx

from graftc.passes.core.ir.edits import Edit, Edits
from graftc.passes.core.ir.functions import call, calls, is_sound
from graftc.passes.core.ir.new_nodes import create_node
from graftc.passes.core.ir.program import InputCheck, InputSpec, OutputSpec, Program
from graftc.passes.core.ir.shapes import DTYPE_NAMES, DTYPES, FakeContext, SymbolNames
from graftc.passes.core.ir.stored.admission import admit
from graftc.passes.core.ir.stored.allowed_operators import OPERATORS
from graftc.passes.core.ir.stored.serialise_history import history_from_json, history_to_json

SCHEMA = 3
HOMES = {"graftc": "graftc.passes.core.ops.decompositions", "transformers": "transformers.integrations.moe"}
"""Modules that register the operators of each namespace."""

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
_CALL = "graftc.call"
_FUNCTION_NAMES = {**{function: name for name, function in _FUNCTIONS.items()}, call: _CALL}
_FORMATS = {str(f): f for f in (torch.contiguous_format, torch.preserve_format, torch.channels_last, torch.strided)}
_NAME = re.compile(r"[A-Za-z_][0-9A-Za-z_]*")
_OUTPUTS = re.compile(r"transformers\.(modeling_outputs|models\.\w+\.(modeling|modular)_\w+)", re.ASCII)
_LONGEST_PATH = 4096
_PATH = re.compile(r"(?!__\w+__(\.|$))[^.]+(\.(?!__\w+__(\.|$))[^.]+)*")
_DAMAGE = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    MemoryError,
    RecursionError,
    RuntimeError,
    SyntaxError,
    TypeError,
    ValueError,
)


class SerialisationError(ValueError):
    """Raised if a program cannot be represented in a file, or a file does not contain a valid program."""


def program_to_json(program: Program) -> dict[str, Any]:
    """Return the whole Program as JSON data.

    Raises:
        SerialisationError: if an operator or argument is outside the closed set.
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
        {
            "name": s.name,
            "dtype": DTYPE_NAMES[s.dtype],
            "shape": list(s.shape),
            "ranges": [list(r) for r in s.ranges],
            **({"apart": [list(pair) for pair in s.apart]} if s.apart else {}),
        }
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
        **({"checks": [[c.message, program_to_json(c.program)] for c in program.checks]} if program.checks else {}),
        **history_to_json(program.history, {node.name: i for node, i in index.items()}),
        "types": table,
        "nodes": nodes,
        "edits": [[e.adaptation, e.site, index[e.before], index[e.after], e.narrow] for e in program.edits],
    }


def program_from_json(data: Mapping[str, Any], device: torch.device, *, called: bool = False) -> Program:
    """Return the Program in data from `program_to_json`, with fake tensors on ``device``.

    Args:
        data: the data as read from the file.
        device: the device of the fake tensors.
        called: whether layers may call functions (`graftc.passes.core.ir.functions`).

    Raises:
        SerialisationError: if the data names anything outside the closed set, or is damaged.
    """
    try:
        program = _program(data, device)
        function_calls = calls(program.graph)
        if (function_calls and not called) or not all(map(is_sound, function_calls)):
            raise SerialisationError("a function call is malformed or not allowed")
        return program
    except SerialisationError:
        raise
    except _DAMAGE as error:
        raise SerialisationError(f"the data is not a valid program: {type(error).__name__}: {error}") from error


def _program(data: Mapping[str, Any], device: torch.device) -> Program:
    if _typed(data, dict).get("schema") != SCHEMA:
        raise SerialisationError(f"schema must be {SCHEMA}, got {data.get('schema')}")
    context = FakeContext()
    values = [_decode_value(value, context, device) for value in _typed(data["types"], list)]
    graph = fx.Graph()
    nodes: list[fx.Node] = []
    for entry in _typed(data["nodes"], list):
        nodes.append(_decode_node(_typed(entry, dict), graph, nodes, values, context))
    inputs = tuple(_decode_input(_typed(entry, dict)) for entry in _typed(data["inputs"], list))
    flags = tuple((_identifier(name), _flag(value)) for name, value in _typed(data["flags"], list))
    history = history_from_json(data, [node.name for node in nodes])
    outputs = _decode_output(_typed(data["outputs"], dict))
    mode, entry = _typed(data["mode"], str), _identifier(data["entry"])
    if mode not in ("train", "eval"):
        raise SerialisationError(f"invalid mode {mode!r}")
    written = frozenset(_path(_typed(name, str)) for name in _typed(data.get("updates", []), list))
    edits = Edits(_decode_edit(_typed(edit, list), nodes) for edit in _typed(data.get("edits", []), list))
    checks = tuple(
        InputCheck(program_from_json(condition, device), _typed(message, str))
        for message, condition in _typed(data.get("checks", []), list)
    )
    program = Program(graph, inputs, outputs, mode, entry, flags, edits, history, updates=written, checks=checks)
    flaw = admit(program)
    if flaw is not None:
        raise SerialisationError(flaw)
    return program


def _decode_node(
    entry: dict[str, Any], graph: fx.Graph, nodes: list[fx.Node], values: list[Any], context: FakeContext
) -> fx.Node:
    kind, name, module = (_typed(entry[key], str) for key in ("op", "name", "module"))
    args = _typed(_decode(entry["args"], nodes, context), tuple)
    kwargs = {_identifier(k): _decode(v, nodes, context) for k, v in _typed(entry["kwargs"], dict).items()}
    if nodes and nodes[-1].op == "output":
        raise SerialisationError("a node follows the outputs")
    if kind == "output":
        (leaves,) = args
        node: fx.Node = graph.output(_typed(leaves, tuple))
    else:
        target = _decode_target(kind, _typed(entry["target"], str))
        if kind != "call_function" and (args or kwargs) and not (kind == "placeholder" and args == (None,)):
            raise SerialisationError(f"{name!r} must not have arguments")
        node = create_node(graph, kind, target, args, kwargs, name=_typed(_NAME.fullmatch(name), re.Match)[0])
        if node.name != name or name == "self":
            raise SerialisationError(f"invalid name {name!r}")
    number = _typed(entry["type"], int)
    if number < 0:
        raise SerialisationError(f"invalid type index {number}")
    node.meta.update(val=values[number], module=module)
    if "custom" in entry:
        node.meta["custom"] = {"graftc": _origin(entry["custom"])}
    return node


def _decode_edit(data: list[Any], nodes: list[fx.Node]) -> Edit:
    adaptation, site, *ends, narrow = data
    before, after = (_typed(number, int) for number in ends)
    if not 0 <= min(before, after) <= max(before, after) < len(nodes):
        raise SerialisationError(f"an edit refers to nodes {before} and {after}, but not both exist")
    return Edit(_typed(adaptation, str), _typed(site, str), nodes[before], nodes[after], _typed(narrow, bool))


def _origin(data: Any) -> dict[str, str]:
    """Return a node's provenance; see `graftc.passes.core.ir.program.provenance`."""
    origin = _typed(_typed(data, dict)["graftc"], dict)
    if len(data) != 1 or origin.keys() != {"adaptation", "method", "site", "part"}:
        raise SerialisationError("the provenance of a node has unexpected keys")
    return {key: _typed(value, str) for key, value in origin.items()}


def _typed(value: Any, wanted: type[Any]) -> Any:
    """Return a value if its type is exactly ``wanted``; otherwise, raise an error."""
    if type(value) is not wanted:
        raise SerialisationError(f"expected {wanted.__name__}, got {type(value).__name__}")
    return value


def _flag(value: Any) -> Any:
    if value is not None and type(value) not in (bool, int, float, str):
        raise SerialisationError(f"invalid flag {value!r}")
    return value


def _decode_input(data: Mapping[str, Any]) -> InputSpec:
    ranges = tuple(
        (_typed(low, int), None if high is None else _typed(high, int)) for low, high in _typed(data["ranges"], list)
    )
    shape = tuple(_typed(data["shape"], list))
    for size in shape:
        if isinstance(size, str):
            first, *others = size.split("+")  # an axis whose size is the sum of two others
            if len(others) > 1:
                raise SerialisationError(f"invalid size {size!r}")
            for name in (first, *others):
                _identifier(name)
        elif _typed(size, int) < 0:
            raise SerialisationError(f"invalid size {size}")
    if ranges and (len(ranges) != len(shape) or any(low < 0 or (high or low) < low for low, high in ranges)):
        raise SerialisationError("an input's ranges are inconsistent")
    apart = tuple((_identifier(a), _identifier(b)) for a, b in _typed(data.get("apart", []), list))
    return InputSpec(_identifier(data["name"]), DTYPES[data["dtype"]], shape, ranges, apart)


def _encode_target(node: fx.Node) -> str:
    target = node.target
    if isinstance(target, str):
        return _path(target) if node.op == "get_attr" else target
    if isinstance(target, torch._ops.OpOverload) and str(target) in OPERATORS:
        return str(target)
    if target in _FUNCTION_NAMES:
        return _FUNCTION_NAMES[target]
    raise SerialisationError(f"unsupported operator {target} at {node.name}")


def _decode_target(op: str, text: str) -> Any:
    if op == "placeholder":
        return _identifier(text)
    if op == "get_attr":
        return _path(text)
    if op == "call_function" and text in _FUNCTIONS:
        return _FUNCTIONS[text]
    if op == "call_function" and text == _CALL:
        return call
    if op != "call_function" or text not in OPERATORS:
        raise SerialisationError(f"unsupported operator {text!r}")
    namespace, name, overload = text.split(".")
    if namespace in HOMES:
        importlib.import_module(HOMES[namespace])
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _path(text: str) -> str:
    """Return a tensor name if it is allowed; it need not be an identifier, since code reads it from a table."""
    if len(text) > _LONGEST_PATH or not text.isprintable() or not _PATH.fullmatch(text):
        raise SerialisationError(f"invalid tensor name {text!r}")
    return text


def _identifier(text: Any) -> str:
    """Return a name for generated code if it is allowed; it must be NFKC-normalised, as Python would normalise it."""
    plain = type(text) is str and text.isidentifier() and unicodedata.normalize("NFKC", text) == text
    if not plain or keyword.iskeyword(text) or text == "self":
        raise SerialisationError(f"invalid name {text!r}")
    return str(text)


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
    raise SerialisationError(f"unsupported argument {value!r}")


def _decode(value: Any, nodes: list[fx.Node], context: FakeContext) -> Any:
    if isinstance(value, list):
        return [_decode(v, nodes, context) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "node":
        if _typed(inner, int) < 0:
            raise SerialisationError(f"invalid argument {value!r}")
        return nodes[inner]
    if kind == "tuple":
        return tuple(_decode(v, nodes, context) for v in _typed(inner, list))
    if kind == "dtype":
        return DTYPES[inner]
    if kind == "size":
        return context.size(_typed(inner, str))
    if kind == "float" and inner in ("nan", "inf", "-inf"):
        return float(inner)
    if kind == "format":
        return _FORMATS[inner]
    raise SerialisationError(f"invalid argument {value!r}")


def _encode_value(value: Any, symbols: SymbolNames) -> Any:
    if isinstance(value, Tensor):
        dtype = DTYPE_NAMES.get(value.dtype)
        if dtype is None:
            raise SerialisationError(f"unsupported dtype {value.dtype}")
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
        return _flag(value)
    if value.keys() == {"size"}:
        return context.size(_typed(value["size"], str))
    if value.keys() != {"dtype", "shape"}:
        raise SerialisationError("a type must be a size, or a dtype with a shape")
    shape = tuple(_typed(size, str) for size in _typed(value["shape"], list))
    return context.tensor(DTYPES[value["dtype"]], shape, device)


def _encode_output(spec: OutputSpec) -> dict[str, Any]:
    data: dict[str, Any] = {"kind": spec.kind}
    if spec.fields:
        data["fields"] = list(spec.fields)
    if spec.children:
        data["children"] = [_encode_output(child) for child in spec.children]
    if spec.cls is not None:
        data["class"] = f"{spec.cls.__module__}:{spec.cls.__qualname__}"
        if not _OUTPUTS.fullmatch(spec.cls.__module__):
            raise SerialisationError(f"unsupported output class {data['class']}")
    return data


def _decode_output(data: Mapping[str, Any]) -> OutputSpec:
    children = tuple(_decode_output(_typed(child, dict)) for child in _typed(data.get("children", []), list))
    fields = tuple(_typed(name, str) for name in _typed(data.get("fields", []), list))
    kind = _typed(data["kind"], str)
    named, nested = kind in ("dict", "class"), kind in ("dict", "class", "tuple", "list")
    fits = (
        len(fields) == (len(children) if named else 0) and len(set(fields)) == len(fields) and (nested or not children)
    )
    if not (nested or kind in ("leaf", "none")) or not fits or ("class" in data) != (kind == "class"):
        raise SerialisationError(f"invalid outputs of kind {kind!r}")
    cls = _output_class(_typed(data["class"], str), fields) if kind == "class" else None
    return OutputSpec(kind, fields, children, cls)


def _output_class(text: str, fields: tuple[str, ...]) -> type[Any]:
    """Return an output class, or a named tuple, that is defined in a module of a transformers model.

    Nothing else is imported.
    """
    from transformers.utils.generic import ModelOutput

    module, _, name = text.partition(":")
    if not _OUTPUTS.fullmatch(module) or not name.isidentifier():
        raise SerialisationError(f"unsupported output class {text!r}")
    cls: Any = vars(importlib.import_module(module)).get(name)
    own = isinstance(cls, type) and issubclass(cls, ModelOutput | tuple) and cls.__module__ == module
    known = getattr(cls, "__dataclass_fields__", getattr(cls, "_fields", ())) if own else ()
    if not own or not set(fields) <= set(known):
        raise SerialisationError(f"unsupported output class {text!r}")
    return cast("type[Any]", cls)
