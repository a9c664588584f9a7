"""Looking at a compiled model: its report, its graphs as text, why things are in them, what a training step takes."""

from __future__ import annotations

from typing import Any, cast

from graftc.compiler.inspect.diff import diff_programs
from graftc.compiler.inspect.explain import explain
from graftc.compiler.inspect.explanation import Explanation
from graftc.compiler.inspect.lowering import Lowered, lowering
from graftc.compiler.inspect.model_explorer import model_explorer
from graftc.compiler.inspect.report import Report, report
from graftc.compiler.inspect.tree import TreeNode, model_tree
from graftc.compiler.signatures import signature_for
from graftc.passes.core.ir.printer import format_program
from graftc.passes.core.ir.program_key import Mode
from graftc.runtime.activations.summary import Activations
from graftc.runtime.model.adapted import AdaptedRunner
from graftc.runtime.model.simulated_step import simulated_step


class Inspecting:
    """Looks at a compiled model.

    Args:
        runner: of the model.
    """

    def __init__(self, runner: AdaptedRunner) -> None:
        self.runner = runner

    @property
    def report(self) -> Report:
        """What every adaptation adds: sites, parameters, bytes, FLOPs per token."""
        if "report" not in self.runner.derived:
            self.runner.derived["report"] = report(self.runner.compilation)
        return cast(Report, self.runner.derived["report"])

    def print_graph(self, mode: Mode = "eval") -> str:
        """The canonical text of the adapted graph."""
        return format_program(self.runner.program(mode))

    def diff(self, mode: Mode = "eval") -> str:
        """The graph before and after, with identical layers collapsed and counted."""
        return diff_programs(self.runner.program(mode, base=True), self.runner.program(mode))

    def explain(self, name: str, mode: Mode = "eval") -> Explanation:
        """Why something is in the adapted graph: a printed value, a node, a place or a tensor; print it to read it.

        Raises:
            GraftError: GC091 where nothing is called so, or several things are.
        """
        return explain(self.runner.snapshot, name, mode)

    def model_explorer(self, mode: Mode = "eval") -> dict[str, Any]:
        """The rewritten graph and the base's own as a collection of Google's Model Explorer, JSON data."""
        return model_explorer(self.runner.snapshot, mode)

    def tree(self) -> TreeNode:
        """The source model's modules with what was added to them, layers that are alike once; print it to read it."""
        return model_tree(self.runner.snapshot)

    def activations(self, **inputs: Any) -> Activations:
        """What a training step keeps for its backward pass and takes at its peak, worked out on tensors without memory.

        Args:
            inputs: of a call; of tensors the sizes count alone. Where the outputs have a ``loss``, the step is that of
                the loss, otherwise that of all outputs.

        Raises:
            GraftError: GC031 for inputs that cannot be captured.
        """
        runner = self.runner
        present, _ = runner.interface.read(runner.interface.named((), inputs))
        return simulated_step(runner, signature_for(runner.shown.compilation, present), present)

    def lowering(self) -> Lowered:
        """Which sites the steps of lowering rewrite in the training graph of the first signature, and why not the
        others; print it to read it."""
        return lowering(self.runner.snapshot)
