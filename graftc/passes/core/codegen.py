"""Code for graphs: functions over a module tree, so that one tree of tensors serves many graphs.

Graphs with equal code share one function object: identical layers compile once.
"""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graftc.passes.canonicalise import takes_device

Function = Callable[..., Any]
_FUNCTIONS: dict[tuple[str, tuple[str, ...]], Function] = {}


def function_of(graph: fx.Graph, device: torch.device) -> Function:
    """``f(module, *inputs)``, which runs ``graph`` on the tensors under ``module``.

    Args:
        graph: names tensors relative to the module.
        device: where tensors are that the graph makes anew.
    """
    placed = fx.Graph()
    output = placed.graph_copy(graph, {})
    placed.output(output)
    for node in placed.nodes:
        if node.op == "call_function" and takes_device(node.target) and not _follows_input(node.target):
            node.kwargs = {**node.kwargs, "device": device}
    code = placed.python_code("self", verbose=False)
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
