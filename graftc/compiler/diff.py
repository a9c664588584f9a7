"""What changed between two Programs, with layers that changed alike collapsed and counted."""

from __future__ import annotations

import difflib
from collections import defaultdict

from torch import fx

from graftc.passes.core.printer import Printer
from graftc.passes.core.program import Program
from graftc.passes.outline import layer_path


def diff_programs(before: Program, after: Program, context: int = 1) -> str:
    """A unified diff of canonical text, by layer; a run of layers with the same change is shown once.

    Args:
        before: the base.
        after: the rewritten Program.
        context: unchanged lines around a change.
    """
    old, new = _by_layer(before), _by_layer(after)
    shown: list[tuple[list[str], str]] = []
    for layer in dict.fromkeys([*new, *old]):
        text = _diff(old.get(layer, []), new.get(layer, []), context)
        if not text:
            continue
        if shown and shown[-1][1] == text and _stack(shown[-1][0][-1]) == _stack(layer):
            shown[-1][0].append(layer)
        else:
            shown.append(([layer], text))
    return "\n".join(f"{_title(layers)}\n{text}" for layers, text in shown) + ("\n" if shown else "")


def _stack(layer: str) -> str:
    return layer.rpartition(".")[0]


def _title(layers: list[str]) -> str:
    if len(layers) == 1:
        return f"@@ {layers[0] or 'outside the layers'} @@"
    return f"@@ {layers[0]} ... {layers[-1].rpartition('.')[2]}: {len(layers)} layers alike @@"


def _by_layer(program: Program) -> dict[str, list[str]]:
    printer = Printer(program, numbered=False)
    found: dict[str, list[str]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op != "get_attr":
            layer = layer_path(node.meta.get("module", "")) if node.op == "call_function" else ""
            found[layer].append(_relative(printer, node, layer))
    return dict(found)


def _relative(printer: Printer, node: fx.Node, layer: str) -> str:
    """The node's line with paths relative to the layer."""
    line = printer.line(node)
    return line.replace(f"{layer}.", "") if layer else line


def _diff(old: list[str], new: list[str], context: int) -> str:
    lines = list(difflib.unified_diff(old, new, lineterm="", n=context))[2:]
    return "\n".join("  ..." if line.startswith("@@") else line for line in lines).removeprefix("  ...\n")
