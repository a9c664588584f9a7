"""Looking at a compiled model: its report, its graphs as text, and why things are in them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from graftc.compiler.compilation import Compilation
from graftc.compiler.inspect.report import Report, report
from graftc.compiler.inspect.snapshot import Snapshot, snapshot
from graftc.passes.core.ir.printer import format_program
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.program_key import Mode
from graftc.specs.document import Spec

if TYPE_CHECKING:
    from graftc.compiler.inspect.explanation import Explanation
    from graftc.compiler.inspect.tree import TreeNode
    from graftc.compiler.roles.structure import Structure


class Inspected:
    """The part of `Compiled` that inspects."""

    _compilation: Compilation

    @property
    def spec(self) -> Spec:
        """The spec it was compiled from."""
        return self._compilation.spec

    @property
    def compilation(self) -> Compilation:
        """Programs, sites and tensors."""
        return self._compilation

    @cached_property
    def report(self) -> Report:
        """What every adaptation adds: sites, parameters, bytes, FLOPs per token."""
        return report(self._compilation)

    @property
    def structure(self) -> Structure:
        """The roles found in the model."""
        return self._compilation.main.structure

    def program(self, mode: Mode = "eval", *, base: bool = False) -> Program:
        """The Program of the first signature: adapted, or the base's own."""
        return self._compilation.program(mode, "base" if base else "adapted")

    @property
    def snapshot(self) -> Snapshot:
        """Places, tensors and Programs as data: what inspecting looks at."""
        return snapshot(self._compilation)

    def print_graph(self, mode: Mode = "eval") -> str:
        """The canonical text of the adapted graph."""
        return format_program(self.program(mode))

    def diff(self, mode: Mode = "eval") -> str:
        """The graph before and after, with identical layers collapsed and counted."""
        from graftc.compiler.inspect.diff import diff_programs

        return diff_programs(self.program(mode, base=True), self.program(mode))

    def explain(self, name: str, mode: Mode = "eval") -> Explanation:
        """Why something is in the adapted graph: a printed value, a node, a place or a tensor; print it to read it.

        Raises:
            GraftError: GC091 where nothing is called so, or several things are.
        """
        from graftc.compiler.inspect.explain import explain

        return explain(self.snapshot, name, mode)

    def model_explorer(self, mode: Mode = "eval") -> dict[str, Any]:
        """The rewritten graph and the base's own as a collection of Google's Model Explorer, JSON data."""
        from graftc.compiler.inspect.model_explorer import model_explorer

        return model_explorer(self.snapshot, mode)

    def tree(self) -> TreeNode:
        """The source model's modules with what was added to them, layers that are alike once; print it to read it."""
        from graftc.compiler.inspect.tree import model_tree

        return model_tree(self.snapshot)
