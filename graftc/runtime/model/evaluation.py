"""Evaluate a model on fixed inputs in eval mode, with all of its adaptations, whatever its current state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor, fx, nn

from graftc.compiler.capture.as_captured import draws, same_draws
from graftc.compiler.folding.evaluating import evaluate_all
from graftc.compiler.live.elements import is_live
from graftc.passes.core.ir.program import Program
from graftc.passes.core.ops.route import Routes
from graftc.passes.graph.route_choices import choices_of
from graftc.runtime.model.choices import repeated
from graftc.runtime.model.model_runner import ModelRunner


@contextmanager
def in_eval_mode(module: nn.Module) -> Iterator[None]:
    """Put a module into eval mode while the block runs, then restore the modes of the module and its submodules."""
    modes = [(each, each.training) for each in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for each, mode in modes:
            each.training = mode


class Evaluation:
    """A model with fixed inputs, which can be run repeatedly and draws the same random numbers each time.

    Args:
        runner: the Runner of the model.
        inputs: tensors by name; flags are those of the first signature, and banks use their default choices.

    Attributes:
        runner: the Runner of the model with every adaptation.
    """

    def __init__(self, runner: ModelRunner, inputs: Mapping[str, Tensor]) -> None:
        self.runner: ModelRunner = runner.complete()
        self._compilation = runner.compilation
        self._present = repeated(runner.compilation, {**inputs, **dict(runner.compilation.flags)})
        base = runner.compilation.program("eval", "base")
        self._chooses = bool(choices_of(base))
        self._draws = is_live(runner.compilation.model) or any(map(draws, base.graph.nodes))

    def outputs(self, routes: Routes | None = None) -> tuple[Any, ...]:
        """Return the flat outputs, computed in the model's own dtype.

        The model's choices among its own values are recorded in ``routes``, or replaced by those imposed by ``routes``.
        """
        if routes is None or not self._chooses:
            return self._run("forward")
        with routes.taken():
            return self._run("routes")

    def outputs_in_float64(self, routes: Routes) -> tuple[Any, ...] | None:
        """Return the flat outputs, computed in float64 from the tensors as stored.

        None if the model draws random numbers, which would not be the same ones, or runs Python between its graphs.
        ``routes`` is as for `outputs`.

        Raises:
            RuntimeError: if an operator has no kernel for float64.
        """
        if self._draws:
            return None
        runner, present = self.runner, self._present
        with in_eval_mode(runner.module):
            program = runner.program_of(runner.ready(present, "routes" if self._chooses else "forward"))
        inputs = {
            node: present[name].double() if present[name].is_floating_point() else present[name]
            for node, name in zip(program.placeholders(), program.signature, strict=True)
        }
        leaves: tuple[Any, ...] = program.output_node.args[0]  # type: ignore[assignment]
        nodes = [leaf for leaf in leaves if isinstance(leaf, fx.Node)]
        with routes.taken():
            values = dict(zip(nodes, evaluate_all(nodes, inputs, runner.store.full), strict=True))
        return tuple(values[leaf] if isinstance(leaf, fx.Node) else leaf for leaf in leaves)

    def _run(self, entry: Literal["forward", "routes"]) -> tuple[Any, ...]:
        runner, present = self.runner, self._present
        with in_eval_mode(runner.module), same_draws(runner.device, self._draws):
            return runner.run(runner.ready(present, entry), present)

    def forget(self) -> None:
        """Discard the code that records choices."""
        self.runner.forget("routes")

    @property
    def base(self) -> Program:
        """The base's graph for inputs of this kind, available once the model has run.

        It may differ from the graph of the first signature, whose sizes may be different.
        """
        signature = self._compilation.find(self._present)
        assert signature is not None
        return self._compilation.program("eval", "base", signature)
