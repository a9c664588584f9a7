"""Two models on the same inputs, the second one with the first one's routes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.compiler.folding.route_evidence import TIMES, Flips, RouteEvidence, moved, score_noise
from graftc.compiler.folding.samples import samples
from graftc.passes.core.ops.route import Routes
from graftc.passes.graph.route_choices import choices_of
from graftc.runtime.model.model_runner import ModelRunner
from graftc.specs.errors.diagnostics import GraftError, first_line

__all__ = ["OutputComparison", "compared"]

Outputs = tuple[Any, ...]


class OutputComparison:
    """The outputs of two models on the same inputs.

    Where a model chooses among its own values, as a router does among experts, the first model's choices are imposed on
    the second, so that a difference in outputs is one of numbers and not of another expert.

    Attributes:
        before, after: flat outputs of either.
        differences: the largest absolute difference of every floating-point output, by its name.
        noise: by the names of choices, how far scores have moved in runs of `repeating`.
        allowed: by the names of choices, how far apart scores may be in any case.
    """

    def __init__(self, before: ModelRunner, after: ModelRunner, inputs: Mapping[str, Tensor]) -> None:
        base = before.compilation.program("eval", "base", before.signature_in_eval(inputs))
        self._model, self._inputs = after, inputs
        self._modules = {node.name: str(node.meta.get("module", "")) for node in choices_of(base)}
        first, self._own = Routes(), Routes()
        with self._routed(before) as run:
            self.before = run(first)
        self._imposed = first.seen
        with self._routed(after) as run:
            self._own = Routes(self._imposed)
            self.after = run(self._own)
        self.differences = {
            name: largest_difference(a, b)
            for name, a, b in zip(base.outputs.names, self.before, self.after, strict=True)
            if isinstance(a, Tensor) and a.is_floating_point()
        }
        self.noise: dict[str, float] = {}
        self.allowed: dict[str, float] = {}

    @property
    def largest(self) -> float:
        """The largest absolute number among the first model's outputs; 1 where it gives none."""
        return max((largest_number(a) for a in self.before if isinstance(a, Tensor)), default=1.0)

    @cached_property
    def flips(self) -> dict[str, Flips]:
        """How often the second model would have chosen differently, by the names of choices."""
        seen = self._own.seen
        both = [name for name in self._modules if name in self._imposed and name in seen]
        return {name: Flips.between(self._imposed[name], seen[name]) for name in both}

    @contextmanager
    def repeating(self) -> Iterator[Callable[[], Outputs]]:
        """Gives what runs the second model again, with the same routes: its weights may have changed a little. `noise`
        says how far scores move."""
        with self._routed(self._model) as run:

            def again() -> Outputs:
                routes = Routes(self._imposed)
                outputs = run(routes)
                for name, far in moved(self._own.seen, routes.seen).items():
                    self.noise[name] = max(far, self.noise.get(name, 0.0))
                return outputs

            yield again

    def allow(self, difference: float, share: float = 0.0) -> None:
        """Count scores as close up to a difference, or up to a share of the largest score of their choice."""
        for name, choice in self._imposed.items():
            self.allowed[name] = max(difference, share * largest_number(choice.scores))

    @property
    def explained(self) -> bool:
        """Whether rounding explains every different choice, as far as `noise` is known."""
        return all(item.passed for item in self.routes)

    @property
    def routes(self) -> tuple[RouteEvidence, ...]:
        """The evidence for each choice, in the order of the graph."""
        evidence: list[RouteEvidence] = []
        for name, item in self.flips.items():
            scores = self._imposed[name].scores
            noise = max(self.noise.get(name, 0.0), score_noise(scores, self._model.dtype))
            bound = max(TIMES * noise, self.allowed.get(name, 0.0))
            evidence.append(RouteEvidence(name, self._modules[name], item.choices, item.flips, item.gap, noise, bound))
        return tuple(evidence)

    @contextmanager
    def _routed(self, model: ModelRunner) -> Iterator[Callable[[Routes], Outputs]]:
        """Gives what runs a model and records its choices. The second model, which nobody else has yet, is without the
        code for that afterwards."""
        if not self._modules:
            yield lambda routes: model.in_eval(self._inputs)
            return

        def run(routes: Routes) -> Outputs:
            with routes.taken():
                return model.in_eval(self._inputs, "routes")

        try:
            yield run
        finally:
            if model is self._model:
                model.complete().forget("routes")


@torch.no_grad()
def compared(before: ModelRunner, after: ModelRunner) -> OutputComparison:
    """Two models of the same interface on random inputs, or, where these make no sense, on those of callers, in eval
    mode.

    Raises:
        GraftError: GC051 where the models do not run on random inputs, and nobody gave others.
    """
    inputs = samples(before.compilation)
    try:
        return OutputComparison(before, after, inputs)
    except (RuntimeError, ValueError, LookupError) as error:
        message = f"the model does not run on random inputs, so that nothing can be certified: {first_line(error)}"
        hint = "call it once, or compile it, with inputs that it runs on: a certificate then runs these"
        raise GraftError("GC051", message, hint=hint) from error
