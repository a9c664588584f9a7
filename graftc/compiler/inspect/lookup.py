"""Look up the printed value, fx node, place or tensor that a name refers to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import fx

from graftc.compiler.inspect.origins import origins
from graftc.compiler.inspect.snapshot import Snapshot
from graftc.passes.core.ir.printer import Printer, printed_tensor
from graftc.passes.core.ir.program_key import Mode
from graftc.passes.core.weights.names import module_of
from graftc.records.explanation import Origin
from graftc.specs.errors.diagnostics import GraftError, nearest

_SHOWN = 10


@dataclass(frozen=True)
class Found:
    """The object that a name refers to; exactly one of the attributes is set."""

    node: fx.Node | None = None
    tensor: str = ""
    site: str = ""
    module: str = ""


class Index:
    """An index of all names in a Compilation's adapted Program.

    Args:
        snapshot: the Compilation.
        mode: the mode of the Program.
    """

    def __init__(self, snapshot: Snapshot, mode: Mode) -> None:
        self.snapshot = snapshot
        self.mode = mode
        self.program = snapshot.program(mode)
        self.printer = Printer(self.program)
        self.names = self.printer.names
        self.stems = Printer(self.program, numbered=False).names
        self.nodes = [node for node in self.program.graph.nodes if node.op != "get_attr"]
        self.attributes: dict[str, fx.Node] = {str(n.target): n for n in self.program.graph.find_nodes(op="get_attr")}
        self.origins = origins(snapshot)
        self.tensors = dict.fromkeys([*snapshot.base, *snapshot.aliases, *snapshot.adapters, *self.attributes])

    def canonical(self, tensor: str) -> str:
        """Return the name that owns a tensor."""
        return self.snapshot.aliases.get(tensor, tensor)

    def type_of(self, tensor: str) -> str:
        """Return a tensor's type as text."""
        record = self.snapshot.base.get(tensor) or self.snapshot.adapters.get(tensor)
        if record is not None:
            return str(record)
        return self.printer.symbols.type(self.attributes[tensor].meta.get("val"))

    def on_tensor(self, tensor: str) -> list[Origin]:
        """Return the adaptations that a tensor belongs to or, for a base tensor, the adaptations at its place."""
        names = {tensor, *(alias for alias, owner in self.snapshot.aliases.items() if owner == tensor)}
        return [o for o in self.origins if tensor in o.tensors or _tensor_of(o.site) in names]

    def base_tensor(self, site: str) -> str:
        """Return the base tensor at a place; empty if the place is not a tensor."""
        name = self.canonical(_tensor_of(site))
        return name if name in self.snapshot.base else ""

    @staticmethod
    def within(module: str, path: str) -> bool:
        """Return whether a module is at or below ``path``."""
        return module == path or module.startswith(f"{path}.") or not path

    @cached_property
    def values(self) -> dict[str, fx.Node]:
        """The nodes by their printed names."""
        return {self.names[node]: node for node in self.nodes}

    @cached_property
    def modules(self) -> dict[str, None]:
        """The paths of all modules with nodes, tensors or adapted places, and of the modules that contain them."""
        paths = [str(node.meta.get("module") or "") for node in self.nodes]
        paths += [module_of(tensor) for tensor in self.tensors] + [origin.module for origin in self.origins]
        modules: dict[str, None] = {}
        for path in dict.fromkeys(paths):
            segments = path.split(".")
            modules |= dict.fromkeys(".".join(segments[:end]) for end in range(1, len(segments) + 1))
        modules.pop("", None)
        return modules

    def find(self, name: str) -> Found:
        """Return the object that a name refers to.

        Raises:
            GraftError: GC091 if the name is unknown or ambiguous.
        """
        asked = name.strip()
        value = self.values.get(asked if asked.startswith("%") else f"%{asked}")
        if value is None and asked == "return":
            value = self.program.output_node
        if value is not None:
            return Found(value)
        if asked.startswith("@"):
            tensors = [tensor for tensor in self.tensors if printed_tensor(tensor) == asked]
            if tensors:
                return Found(tensor=tensors[0])
        if asked in self._fx:
            return self._of_node(self._fx[asked])
        sites = {origin.site for origin in self.origins if origin.site}
        for spelling in (asked, asked.partition("#")[0]):
            if spelling in sites:
                return Found(site=spelling)
        if asked in self.modules:
            return Found(module=asked)
        if asked in self.tensors:
            return Found(tensor=asked)
        return self._by_segments(asked, name)

    @cached_property
    def _fx(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.program.graph.nodes}

    @staticmethod
    def _of_node(node: fx.Node) -> Found:
        return Found(tensor=str(node.target)) if node.op == "get_attr" else Found(node)

    def _by_segments(self, asked: str, name: str) -> Found:
        """Return the module or tensor whose path has the requested segments in order and ends with the last of them."""
        if not asked or asked.startswith("%"):
            raise self._unknown(name)
        if asked.startswith("@"):
            short = {printed_tensor(tensor): tensor for tensor in self.tensors}
            fits = _having(asked, short)
            if len(fits) == 1:
                return Found(tensor=short[fits[0]])
        else:
            fits = _having(asked, self.modules)
            if len(fits) == 1:
                return Found(module=fits[0])
            if not fits:
                fits = _having(asked, self.tensors)
                if len(fits) == 1:
                    return Found(tensor=fits[0])
        if not fits:
            raise self._unknown(name)
        more = [f"and {len(fits) - _SHOWN} more"] if len(fits) > _SHOWN else []
        raise GraftError(
            "GC091",
            f"'{name}' matches {len(fits)} names",
            hint=f"use more of the path, for example '{fits[0]}'",
            details=[*fits[:_SHOWN], *more],
        )

    def _unknown(self, name: str) -> GraftError:
        asked = name.strip()
        message = f"nothing in the {self.mode} graph is called '{name}'"
        other: Mode = "train" if self.mode == "eval" else "eval"
        values = Printer(self.snapshot.program(other)).names.values()
        if (asked if asked.startswith(("%", "@")) else f"%{asked}") in values:
            return GraftError("GC091", message, hint=f"the {other} graph has it: use mode {other}")
        near = nearest(asked, self._candidates(asked))
        hint = f"did you mean {' or '.join(repr(c) for c in near)}?" if near else "print the graph to see its names"
        return GraftError("GC091", message, hint=hint)

    def _candidates(self, asked: str) -> Iterable[str]:
        if asked.startswith("%"):
            return list(self.values)
        if asked.startswith("@"):
            return [printed_tensor(tensor) for tensor in self.tensors]
        return [*(value[1:] for value in self.values), *self.modules, *self.tensors]


def _tensor_of(site: str) -> str:
    """Return a SiteKey's text without part and use."""
    return site.partition("[")[0].partition("#")[0]


def _having(asked: str, candidates: Iterable[str]) -> Sequence[str]:
    """Return the candidates that have the segments of ``asked`` in order and end with the last of them."""
    wanted = asked.split(".")
    return [candidate for candidate in candidates if _in_order(wanted, candidate.split("."))]


def _in_order(wanted: Sequence[str], segments: Sequence[str]) -> bool:
    rest = iter(segments)
    return wanted[-1] == segments[-1] and all(segment in rest for segment in wanted)
