"""Report how much of each stack of layers runs as a graph, and what prevents more of it from doing so."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping

from torch import nn

from graftc.compiler.compilation import Compilation
from graftc.compiler.live.elements import hold_all, is_live, layers_of, maps_of
from graftc.passes.core.elements.calls import elements_in, innermost
from graftc.passes.core.ir.program import Program
from graftc.records.report import StackLevel, StackReport


def stacks(compilation: Compilation, base: Program) -> tuple[StackReport, ...]:
    """Return a report on each of a model's stacks, in model order; a model without repeated layers has none.

    Args:
        compilation: the model's Compilation.
        base: the first signature's base graph, with every layer written out.
    """
    model, why = compilation.source, compilation.in_the_way
    elements = elements_in(compilation.flags) if is_live(compilation.model) else None
    rows: dict[str, list[str]] = defaultdict(list)
    for path in layers_of(model):
        rows[path.rpartition(".")[0]].append(path)
    maps = frozenset(() if elements is None else maps_of(model))
    read = {str(node.target) for node in base.graph.nodes if node.op == "get_attr"}
    return tuple(
        StackReport(row, len(layers), _parameters(model, layers), level, _reason(row, level, why))
        for row, layers in rows.items()
        for level in [_called(layers, read) if elements is None else _level(model, layers, elements, maps)]
    )


def _parameters(model: nn.Module, layers: Collection[str]) -> int:
    every = {id(p): p.numel() for path in layers for p in model.get_submodule(path).parameters()}
    return sum(every.values())


def _called(layers: Collection[str], read: Collection[str]) -> StackLevel:
    prefixes = tuple(f"{path}." for path in layers)
    return "graph" if any(name.startswith(prefixes) for name in read) else "none"


def _level(model: nn.Module, layers: Collection[str], elements: Collection[str], maps: Collection[str]) -> StackLevel:
    known = frozenset(layers)
    parts = {element for element in elements if innermost(element, known)}
    if not parts:
        return "none"
    single = (parts - known).intersection(maps)
    return "modules" if single or not hold_all(model, layers, parts) else "layers"


def _reason(row: str, level: StackLevel, why: Mapping[str, str]) -> str:
    if level == "none":
        return "the inputs shown do not call it"
    if level == "graph":
        return ""
    return why.get(row, "" if level == "modules" else why.get("", ""))
