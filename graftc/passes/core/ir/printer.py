"""The canonical text of a Program and its structural hash, both stable across runs and machines.

Symbols are renumbered; paths and addresses are never printed. The hash identifies each value by its computation
(target, ordered arguments, literals), in linear time, so the order and the names of nodes do not matter.
"""

from __future__ import annotations

import hashlib
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import fx

from graftc.passes.core.ir.effects import Memory
from graftc.passes.core.ir.program import Program, is_random, mutates, provenance
from graftc.passes.core.ir.shapes import DTYPE_NAMES, SymbolNames
from graftc.passes.core.weights.names import module_of, parsed

_ROWS = re.compile(r"\[([^\[\]]*)\](?:#\d+)?$")
"""Matches the rows named in a site's text; module names may contain brackets too."""


def target_name(target: Any) -> str:
    """Return a call target as text: ``aten.linear``, ``aten.add.Tensor``, ``getitem``."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target).removesuffix(".default")
    if target is operator.getitem:
        return "getitem"
    return str(getattr(target, "__name__", target))


def printed_tensor(fqn: str) -> str:
    """Return a Store name as text: ``@base.q.weight``, or ``@attention.q.A`` for the adaptation *attention*."""
    name = parsed(fqn)
    if name is None:
        return f"@base.{fqn}"
    return "@" + ".".join(segment for segment in (name.adaptation, name.module, name.part) if segment)


def literal(value: Any, node_text: Callable[[fx.Node], str], names: SymbolNames) -> str:
    """Return an argument as text."""
    if isinstance(value, fx.Node):
        return node_text(value)
    if isinstance(value, list | tuple):
        inner = ", ".join(literal(item, node_text, names) for item in value)
        return f"[{inner}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{k}: {literal(v, node_text, names)}" for k, v in value.items()) + "}"
    if isinstance(value, torch.dtype):
        return DTYPE_NAMES.get(value, str(value))
    if isinstance(value, torch.SymInt):
        return names.size(value)
    if isinstance(value, torch.device | torch.layout | torch.memory_format):
        return str(value)
    return repr(value)


def _stem(node: fx.Node) -> str:
    """Return the base name of a value.

    This is ``query`` for the output of the module *query*'s own weight, ``query.down`` for a part of an adaptation at
    that module, and otherwise the operator's name.
    """
    if node.op == "placeholder":
        return str(node.target)
    module = str(node.meta.get("module", ""))
    leaf = module.rpartition(".")[2]
    origin = provenance(node)
    if origin is not None:
        match = _ROWS.search(origin["site"].rpartition(".")[2])
        rows = match[1] if match is not None else ""
        return ".".join(word for word in (leaf, rows, origin["part"].replace(" ", "_")) if word)
    if leaf and any(n.op == "get_attr" and module_of(str(n.target)) == module for n in node.all_input_nodes):
        return leaf
    words = target_name(node.target).split(".")
    return words[1] if len(words) > 1 else words[0]


class Printer:
    """Prints the nodes of one Program, naming each value after its computation.

    Args:
        program: the Program whose nodes are printed.
        numbered: whether to number values that have the same name; otherwise, identical layers print identically.
    """

    def __init__(self, program: Program, *, numbered: bool = True) -> None:
        self.program = program
        self.symbols = SymbolNames(program)
        self.names: dict[fx.Node, str] = {}
        counts: Counter[str] = Counter()
        taken: set[str] = set()
        for node in program.graph.nodes:
            if node.op == "get_attr":
                self.names[node] = printed_tensor(str(node.target))
                continue
            name = base = f"%{_stem(node)}"
            # A module may have the same name as a numbered value: ln and ln_1.
            while numbered and name in taken:
                counts[base] += 1
                name = f"{base}_{counts[base]}"
            taken.add(name)
            self.names[node] = name

    def line(self, node: fx.Node) -> str:
        """Return a node as one line; not for `get_attr` nodes, which are not printed on their own."""
        if node.op == "placeholder":
            return f"{self.names[node]}: {self.symbols.type(node.meta.get('val'))} = input"
        if node.op == "output":
            return f"return {self.arguments(node)}"
        call = f"{target_name(node.target)}({self.arguments(node)})"
        text = f"{self.names[node]}: {self.symbols.type(node.meta.get('val'))} = {call}"
        return f"{text}  # {self.comment(node)}"

    def arguments(self, node: fx.Node) -> str:
        """Return a call's arguments as text, in order, with keyword arguments last."""
        parts = [literal(a, self.names.__getitem__, self.symbols) for a in node.args]
        parts += [f"{k}={literal(v, self.names.__getitem__, self.symbols)}" for k, v in node.kwargs.items()]
        return ", ".join(parts)

    @staticmethod
    def comment(node: fx.Node) -> str:
        """Return the node's origin: its module, or the adaptation that inserted it."""
        origin = provenance(node)
        if origin is None:
            return str(node.meta.get("module") or "(root)")
        return f"+ {origin['adaptation']} ({origin['method']}) {origin['part']} @ {origin['site']}"

    def lines(self, nodes: Iterable[fx.Node] | None = None) -> list[str]:
        """Return the lines of ``nodes``; by default, those of the whole graph."""
        chosen = self.program.graph.nodes if nodes is None else nodes
        return [self.line(node) for node in chosen if node.op != "get_attr"]


def format_program(program: Program) -> str:
    """Return the canonical text of a Program."""
    return "\n".join([f"program {program.entry} ({program.mode})", *Printer(program).lines()]) + "\n"


def format_around(program: Program, node: fx.Node, context: int = 4) -> str:
    """Return the lines around a node, with the node marked, for error messages."""
    nodes = [n for n in program.graph.nodes if n.op != "get_attr"]
    printer = Printer(program)
    at = nodes.index(node) if node in nodes else 0
    chosen = nodes[max(0, at - context) : at + context + 1]
    return "\n".join(("> " if n is node else "  ") + printer.line(n) for n in chosen)


def value_numbers(program: Program, canonical: Callable[[str], str] = str) -> dict[fx.Node, str]:
    """Return a digest of each node's computation: its target, ordered arguments and literals.

    Args:
        program: the Program whose nodes are hashed.
        canonical: a function from a tensor's name to its canonical name, so that tied names count as the same name.
    """
    return _numbered(program, canonical)[0]


def _numbered(program: Program, canonical: Callable[[str], str]) -> tuple[dict[fx.Node, str], list[str]]:
    """Return the digests of all nodes, and those of the nodes that change a value in place.

    The digest of a node that reads a value depends on the value's origin and on earlier in-place changes to it.
    """
    names = SymbolNames(program)
    digests: dict[fx.Node, str] = {}
    draws = 0
    memory = Memory(program.graph)
    changed: dict[fx.Node, str] = {}
    writes: list[str] = []

    def text(source: fx.Node) -> str:
        roots = sorted(memory.roots(source) & changed.keys())
        return "+".join([digests[source], *(changed[root] for root in roots)])

    for node in program.graph.nodes:
        parts = [node.op]
        if node.op == "get_attr":
            parts.append(canonical(str(node.target)))
        elif node.op == "placeholder":
            parts.append(str(node.target))
        else:
            parts.append(target_name(node.target))
            parts += [literal(a, text, names) for a in node.args]
            parts += [f"{k}={literal(v, text, names)}" for k, v in sorted(node.kwargs.items())]
        if is_random(node):
            parts.append(f"draw {draws}")
            draws += 1
        digests[node] = hashlib.sha256("\x00".join(parts).encode()).hexdigest()[:32]
        if mutates(node):
            writes.append(digests[node])
            changed |= dict.fromkeys(memory.writes.get(node, ()), digests[node])
    return digests, writes


def structural_hash(program: Program, canonical: Callable[[str], str] = str) -> str:
    """Return a digest of everything that a Program's outputs and in-place changes depend on."""
    interface = ",".join(sorted(f"{s.name}:{s.dtype}:{s.shape}" for s in program.inputs))
    digests, writes = _numbered(program, canonical)
    content = "|".join([interface, digests[program.output_node], *writes])
    return hashlib.sha256(content.encode()).hexdigest()[:32]
