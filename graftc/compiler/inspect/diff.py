"""Compare two Programs; layers with the same changes are collapsed and counted."""

from __future__ import annotations

import difflib
from collections import Counter, defaultdict
from collections.abc import Iterator

from torch import fx

from graftc.passes.core.ir.layers import layer_path
from graftc.passes.core.ir.printer import Printer, printed_tensor
from graftc.passes.core.ir.program import Program, provenance
from graftc.records.graphs import Diff, DiffChange


def diff_programs(before: Program, after: Program, context: int = 1) -> str:
    """Return the result of `diff` as text."""
    return diff(before, after, context).text()


def diff(before: Program, after: Program, context: int = 1) -> Diff:
    """Return the changes by layer; layers of one stack with the same changes are shown once.

    Values are numbered within their layer, and base nodes have the numbers of ``before`` in both Programs. ``%in`` is a
    value that enters a layer from another layer, or from outside the layers if no other layer of the stack reads it.

    Args:
        before: the base Program.
        after: the rewritten Program.
        context: number of unchanged lines around a change.
    """
    names = _Names(before, after)
    old, new = _by_layer(before, names), _by_layer(after, names)
    changes: dict[tuple[str, tuple[str, ...]], tuple[list[str], tuple[str, ...]]] = {}
    for layer in dict.fromkeys([*new, *old]):
        lines = tuple(_diff(old.get(layer, []), new.get(layer, []), context))
        changed = tuple(line for line in lines if line[0] in "+-")
        if changed:
            # Unchanged lines around a change may be numbered differently in the first layer of a stack.
            changes.setdefault((_stack(layer), changed), ([], lines))[0].append(layer)
    return Diff(after.mode, tuple(_change(layers, lines) for layers, lines in changes.values()))


def _change(layers: list[str], lines: tuple[str, ...]) -> DiffChange:
    gone, come = (Counter(line[1:].split(": ", 1)[0] for line in lines if line[0] == mark) for mark in "-+")
    changed = (gone & come).total()
    return DiffChange(tuple(layers), come.total() - changed, gone.total() - changed, changed, lines)


def _stack(layer: str) -> str:
    return layer.rpartition(".")[0]


class _Names:
    """The names of values in two Programs, which are the same in layers that compute the same.

    Base nodes keep their fx names when a graph is rewritten, so these names identify them.
    """

    def __init__(self, before: Program, after: Program) -> None:
        self._local: dict[tuple[str, str], str] = {}
        self._numbers: Counter[tuple[str, str]] = Counter()
        self._entering: dict[tuple[str, str], str] = {}
        self._counts: Counter[str] = Counter()
        self._readers: dict[str, set[str]] = defaultdict(set)
        for program in (before, after):
            stems = Printer(program, numbered=False).names
            for node in program.graph.nodes:
                if node.op == "get_attr":
                    continue
                key = self._key(node)
                if key not in self._local:
                    layer, stem = _layer(node), stems[node]
                    number = self._numbers[layer, stem]
                    self._numbers[layer, stem] += 1
                    self._local[key] = f"{stem}_{number}" if number else stem
                self._readers[node.name] |= {layer for layer in map(_layer, node.users) if layer}

    @staticmethod
    def _key(node: fx.Node) -> tuple[str, str]:
        # The fx name of an inserted node may belong to a different node in the other Program.
        return node.name, "" if provenance(node) is None else str(provenance(node))

    def seen_from(self, layer: str, node: fx.Node) -> str:
        """Return a node's name in the text of a layer."""
        if node.op == "get_attr":
            return _relative(printed_tensor(str(node.target)), layer)
        home, local = _layer(node), self._local[self._key(node)]
        if home == layer:
            return local
        siblings = {other for other in self._readers[node.name] if _stack(other) == _stack(layer)}
        if not layer:
            return f"%{'.'.join(home.split('.')[-2:])}:{local[1:]}"
        if not home and siblings != {layer}:
            return local
        place = (layer, node.name)
        if place not in self._entering:
            number = self._counts[layer]
            self._counts[layer] += 1
            self._entering[place] = f"%in_{number}" if number else "%in"
        return self._entering[place]


class _Seen(dict[fx.Node, str]):
    """The names of nodes as seen from one layer, created on demand."""

    def __init__(self, names: _Names, layer: str) -> None:
        super().__init__()
        self._names, self._layer = names, layer

    def __missing__(self, node: fx.Node) -> str:
        self[node] = text = self._names.seen_from(self._layer, node)
        return text


def _layer(node: fx.Node) -> str:
    return layer_path(node.meta.get("module", "")) if node.op == "call_function" else ""


def _by_layer(program: Program, names: _Names) -> dict[str, list[str]]:
    """Return a Program's lines by layer."""
    printer = Printer(program, numbered=False)
    seen: dict[str, _Seen] = {}
    lines: dict[str, list[str]] = defaultdict(list)
    for node in program.graph.nodes:
        if node.op == "get_attr":
            continue
        layer = _layer(node)
        printer.names = seen.setdefault(layer, _Seen(names, layer))
        lines[layer].append(_relative(printer.line(node), layer))
    return dict(lines)


def _relative(text: str, layer: str) -> str:
    """Return a text with its paths made relative to a layer."""
    return text.replace(f"{layer}.", "") if layer else text


def _diff(old: list[str], new: list[str], context: int) -> Iterator[str]:
    lines = list(difflib.unified_diff(old, new, lineterm="", n=context))[2:]
    for index, line in enumerate(lines):
        if not line.startswith("@@"):
            yield line
        elif index:
            yield "  ..."
