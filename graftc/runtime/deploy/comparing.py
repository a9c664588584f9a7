"""Compare two models on the same inputs, with the first one's routes imposed on the second."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from graftc.compiler.folding.differences import largest_difference, largest_number
from graftc.compiler.folding.route_evidence import TIMES, Flips, moved, score_noise
from graftc.compiler.folding.samples import samples
from graftc.passes.core.ops.route import Routes
from graftc.records.certificate import RouteEvidence
from graftc.runtime.model.evaluation import Evaluation
from graftc.runtime.model.model_runner import ModelRunner
from graftc.specs.errors.diagnostics import GraftError, first_line, warn

Outputs = tuple[Any, ...]
_FAR = 10
"""How many times larger one model's rounding must be than the other's to be called its own."""


class OutputComparison:
    """A comparison of two models' outputs on the same inputs.

    If a model chooses among its own values, as a router does among experts, the first model's choices are imposed on
    the second, so that differences in outputs are numerical and not caused by different experts.

    Attributes:
        before, after: flat outputs of each model.
        differences: the largest absolute difference in every floating-point output, by name.
        noise: by choice name, how far scores moved in runs of `repeating`.
        allowed: by choice name, the difference in scores that is allowed regardless of noise.
    """

    def __init__(self, first: Evaluation, second: Evaluation, difference: float = 0.0, share: float = 0.0) -> None:
        routes = Routes()
        self.before = first.outputs(routes)
        self._imposed, self._first, self._second = routes.seen, first, second
        base = first.base
        chosen = (node for node in base.graph.nodes if node.name in self._imposed)
        self._modules = {node.name: str(node.meta.get("module", "")) for node in chosen}
        self._own = Routes(self._imposed)
        try:
            self.after = second.outputs(self._own)
        finally:
            second.forget()
        self._names = base.outputs.names
        self.differences = self._between(self.before, self.after)
        self.noise: dict[str, float] = {}
        self.allowed = {
            name: max(difference, share * largest_number(choice.scores)) for name, choice in self._imposed.items()
        }

    def within(self, budget: float) -> tuple[dict[str, float], tuple[str, ...]]:
        """Return the differences in outputs, and notes about them.

        Rounding inside a model may be amplified beyond a budget even if both models compute the same function. If
        differences exceed the budget, both models are evaluated in float64, in which only their tensors are rounded.
        The differences are then those in float64 if they do not exceed the budget.

        Warns:
            GraftWarning: GC169 if the first model's own rounding, which the second does not share, is the cause.
        """
        worst = max(self.differences.values(), default=0.0)
        wide = self._in_float64() if budget < worst < math.inf else None
        if wide is None:
            return self.differences, ()
        differences = self._between(*wide)
        if not all(value <= budget for value in differences.values()):
            return self.differences, ()
        before, after = (
            max(self._between(own, exact).values()) for own, exact in zip((self.before, self.after), wide, strict=True)
        )
        dtype = str(self._second.runner.dtype).removeprefix("torch.")
        if before > _FAR * after:
            message = (
                f"in {dtype}, rounding inside the adapted model changes its outputs by {before:.1e}, and those of the "
                f"folded model by {after:.1e}: the fold is right, but outputs differ from before by {worst:.1e}"
            )
            warn("GC169", message)
        note = (
            f"outputs are compared in float64; in {dtype} they differ by {worst:.1e}, because rounding inside the "
            f"model changes them by {before:.1e} before folding and by {after:.1e} after it"
        )
        return differences, (note,)

    def _in_float64(self) -> tuple[Outputs, Outputs] | None:
        """Return the outputs of both models in float64, on the first one's routes; None if they cannot be computed."""
        try:
            first, second = (each.outputs_in_float64(Routes(self._imposed)) for each in (self._first, self._second))
        except (RuntimeError, ValueError, LookupError):  # such as an operator without a float64 kernel
            return None
        finally:
            self._second.forget()
        return None if first is None or second is None else (first, second)

    def _between(self, first: Sequence[Any], second: Sequence[Any]) -> dict[str, float]:
        """Return the largest absolute difference in every output of real or complex numbers, by name."""
        return {
            name: largest_difference(a, b)
            for name, a, b in zip(self._names, first, second, strict=True)
            if _is_compared(a)
        }

    @property
    def largest(self) -> float:
        """The largest absolute value in the first model's outputs that folding changes; 0 if it changes none.

        Others say nothing about the size of differences: constants, such as those that mask scores, and whole numbers.
        """
        return max(
            (largest_number(_changed(a, b)) for a, b in zip(self.before, self.after, strict=True) if _is_compared(a)),
            default=0.0,
        )

    @cached_property
    def flips(self) -> dict[str, Flips]:
        """The counts of choices that the second model would have made differently, by choice name."""
        seen = self._own.seen
        both = [name for name in self._modules if name in self._imposed and name in seen]
        return {name: Flips.between(self._imposed[name], seen[name]) for name in both}

    @contextmanager
    def repeating(self) -> Iterator[Callable[[], Outputs]]:
        """Yield a function that runs the second model again with the same routes, after small changes to its weights.

        Each run updates `noise`, which records how far scores move.
        """

        def again() -> Outputs:
            routes = Routes(self._imposed)
            outputs = self._second.outputs(routes)
            for name, far in moved(self._own.seen, routes.seen).items():
                self.noise[name] = max(far, self.noise.get(name, 0.0))
            return outputs

        try:
            yield again
        finally:
            self._second.forget()

    @property
    def explained(self) -> bool:
        """Whether rounding explains every different choice, according to the `noise` measured so far."""
        return all(item.passed for item in self.routes)

    @property
    def routes(self) -> tuple[RouteEvidence, ...]:
        """The evidence for each choice, in graph order."""
        evidence: list[RouteEvidence] = []
        for name, item in self.flips.items():
            scores = self._imposed[name].scores
            noise = max(self.noise.get(name, 0.0), score_noise(scores, self._second.runner.dtype))
            bound = max(TIMES * noise, self.allowed.get(name, 0.0))
            evidence.append(RouteEvidence(name, self._modules[name], item.choices, item.flips, item.gap, noise, bound))
        return tuple(evidence)


def _is_compared(output: Any) -> bool:
    return isinstance(output, Tensor) and (output.is_floating_point() or output.is_complex())


def _changed(before: Tensor, after: Tensor) -> Tensor:
    """Return the elements that are not the same in both tensors."""
    return before[before != after.to(before.device)] if before.shape == after.shape else before


@torch.no_grad()
def compared(before: ModelRunner, after: ModelRunner, difference: float = 0.0, share: float = 0.0) -> OutputComparison:
    """Compare two models with the same interface in eval mode.

    The inputs are random or, if random inputs make no sense, inputs from callers.

    Args:
        before: the first model.
        after: the second model, which must not be in use elsewhere yet.
        difference, share: scores count as close if they are at most ``difference`` apart, or at most ``share`` times
            the largest score of their choice.

    Raises:
        GraftError: GC051 if the models do not run on random inputs and no caller provided others.
    """
    inputs = samples(before.compilation)
    try:
        return OutputComparison(Evaluation(before, inputs), Evaluation(after, inputs), difference, share)
    except (RuntimeError, ValueError, LookupError) as error:
        message = f"the model does not run on random inputs, so nothing can be certified: {first_line(error)}"
        hint = "call it once, or compile it, with inputs that it runs on: a certificate then uses them"
        raise GraftError("GC051", message, hint=hint) from error
