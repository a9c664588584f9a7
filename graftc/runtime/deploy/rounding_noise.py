"""Measure a comparison's noise: the change in outputs when folded weights are rounded differently."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from graftc.compiler.folding.differences import largest_difference
from graftc.compiler.folding.rounding import rounded_differently

TIMES = 8
"""The maximum number of random roundings to try. A router chooses differently in only a few of them."""


def rounding_noise(
    weights: Mapping[str, Tensor],
    recast: Callable[[str], Tensor],
    run: Callable[[], Sequence[object]],
    outputs: Sequence[object],
    enough: Callable[[float], bool] = lambda _: False,
) -> float:
    """Return the largest difference in outputs over a few runs in which weights are rounded differently.

    In one run, the tensors from which weights are folded are rounded first, as in the adapted graph. In the others,
    every entry is multiplied by ``1 + r``, with ``r`` drawn from ``[-eps / 2, eps / 2]`` with a fixed seed, and rounded
    to its dtype. Weights change only by rounding: a wrong weight stays wrong, so its error is not explained as noise.
    Afterwards, even after an error, their original values are restored.

    Args:
        weights: floating-point weights by name, which are overwritten one after the other.
        recast: a function that returns the change to a weight for the first of these roundings.
        run: a function that returns the outputs of the model that has the weights.
        outputs: the outputs with the weights unchanged.
        enough: a predicate for the largest difference so far; no further run is tried once it returns true.
    """
    detached = {name: weight.detach() for name, weight in weights.items()}
    originals = {name: weight.clone() for name, weight in detached.items()}

    def moved() -> float:
        pairs = zip(run(), outputs, strict=True)
        tensors = [(a, b) for a, b in pairs if isinstance(a, Tensor) and isinstance(b, Tensor)]
        return max((largest_difference(a, b) for a, b in tensors if a.is_floating_point()), default=0.0)

    try:
        for name, weight in detached.items():
            weight.copy_(originals[name].double().add_(recast(name)))
        worst = moved()
        for seed in range(TIMES):
            if enough(worst):
                break
            generator = torch.Generator().manual_seed(seed)
            for name, own in originals.items():
                detached[name].copy_(rounded_differently(own, generator))
            worst = max(worst, moved())
    finally:
        for name, weight in detached.items():
            weight.copy_(originals[name])
    return worst
