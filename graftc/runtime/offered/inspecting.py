"""Inspect a compiled model: its report, graphs as text, explanations, and the memory use of a training step."""

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
        """The cost of each adaptation: sites, parameters, bytes and FLOPs per token."""
        return self.runner.once("report", lambda: report(self.runner.compilation))

    def print_graph(self, mode: Mode = "eval") -> str:
        """Return the canonical text of the adapted graph."""
        return format_program(self.runner.program(mode))

    def diff(self, mode: Mode = "eval") -> str:
        """Return a diff of the graphs before and after adaptation, with identical layers collapsed and counted."""
        return diff_programs(self.runner.program(mode, base=True), self.runner.program(mode))

    def explain(self, name: str, mode: Mode = "eval") -> Explanation:
        """Explain why a printed value, node, place or tensor is in the adapted graph; print the result to read it.

        Args:
            name: the name, as printed.
            mode: the mode of the graph.

        Raises:
            GraftError: GC091 if the name is unknown or ambiguous.
        """
        return explain(self.runner.snapshot, name, mode)

    def model_explorer(self, mode: Mode = "eval") -> dict[str, Any]:
        """Return the rewritten graph and the base's graph as a JSON graph collection for Google's Model Explorer."""
        return model_explorer(self.runner.snapshot, mode)

    def tree(self) -> TreeNode:
        """Return the source model's modules with their additions, and identical layers once; print it to read it."""
        return model_tree(self.runner.snapshot)

    def activations(self, **inputs: Any) -> Activations:
        """Return the activations that a training step keeps and its peak memory, computed on tensors without memory.

        Args:
            inputs: the inputs of a call; only the sizes of tensors matter. The backward pass starts from the ``loss``
                if the outputs have one, otherwise from all outputs.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        runner = self.runner
        present, _ = runner.interface.read(runner.interface.named((), inputs))
        signature = signature_for(runner.shown.compilation, present)  # before the copy, as the signature may be new
        return Simulation(runner).step(signature, present)

    def lowering(self) -> Lowered:
        """Return the sites that lowering rewrites in the first signature's training graph, and why it skips others.

        Print the result to read it.
        """
        return lowering(self.runner.snapshot)
