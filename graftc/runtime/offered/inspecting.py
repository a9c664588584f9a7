"""Inspection of a compiled model: its report, its graphs as text, explanations, and the memory of a training step."""

from __future__ import annotations

from typing import Any

from graftc.compiler.inspect.diff import diff_programs
from graftc.compiler.inspect.explain import explain
from graftc.compiler.inspect.lowering import Lowered, lowering
from graftc.compiler.inspect.model_explorer import model_explorer
from graftc.compiler.inspect.report import report
from graftc.compiler.inspect.tree import model_tree
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.printer import format_program
from graftc.passes.core.ir.program_key import Mode
from graftc.records.explanation import Explanation
from graftc.records.report import Report
from graftc.records.tree import TreeNode
from graftc.runtime.activations.summary import Activations
from graftc.runtime.model.feature import Feature
from graftc.runtime.model.simulated_step import Simulation


class Inspecting(Feature):
    """Inspects a compiled model."""

    @property
    def report(self) -> Report:
        """The additions of every adaptation: sites, parameters, bytes, FLOPs per token."""
        return self.runner.once("report", lambda: report(self.runner.compilation))

    def print_graph(self, mode: Mode = "eval") -> str:
        """Return the canonical text of the adapted graph."""
        return format_program(self.runner.program(mode))

    def diff(self, mode: Mode = "eval") -> str:
        """Return the graph before and after adaptation as a diff, with identical layers collapsed and counted."""
        return diff_programs(self.runner.program(mode, base=True), self.runner.program(mode))

    def explain(self, name: str, mode: Mode = "eval") -> Explanation:
        """Explain why a printed value, node, place or tensor is in the adapted graph; print the result to read it.

        Raises:
            GraftError: GC091 if nothing has this name, or several things have.
        """
        return explain(self.runner.snapshot, name, mode)

    def model_explorer(self, mode: Mode = "eval") -> dict[str, Any]:
        """Return the rewritten graph and the base's own as a collection of Google's Model Explorer, in JSON data."""
        return model_explorer(self.runner.snapshot, mode)

    def tree(self) -> TreeNode:
        """Return the source model's modules with the additions to them, equal layers once; print it to read it."""
        return model_tree(self.runner.snapshot)

    def activations(self, **inputs: Any) -> Activations:
        """Return what a training step keeps and its peak memory, computed on tensors without memory.

        Args:
            inputs: inputs of a call; only the sizes of tensors matter. If the outputs have a ``loss``, the step is that
                of the loss, otherwise that of all outputs.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        runner = self.runner
        present, _ = runner.interface.read(runner.interface.named((), inputs))
        signature = signature_for(runner.shown.compilation, present)  # before the copy: it may be a new one
        return Simulation(runner).step(signature, present)

    def lowering(self) -> Lowered:
        """Return the sites that the lowering steps rewrite, and the reason why each of the others is not rewritten.

        The graph is the training graph of the first signature; print the result to read it.
        """
        return lowering(self.runner.snapshot)
