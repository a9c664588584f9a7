"""How much training changes the magnitudes and the directions of weights (Liu et al. 2024, DoRA, section 3.2)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from experiments.encoder import encoder_of
from experiments.probing import chosen_by, encoded_texts, fitted, scores
from experiments.tasks import task_of

Change = tuple[float, float]
"""The mean change of a weight's magnitudes, and of its directions."""


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell.

    ``correlation`` is Pearson's, of the two changes of `change` over the layers, for each linear map of a layer and at
    each of four moments of training; the mean of all. ``magnitude`` and ``direction`` are the mean changes at the end.

    Args:
        cell: as for `experiments.classifying.figures`.
    """
    settings, seed = cell["settings"], cell["seed"]
    task = task_of(settings, seed)
    texts, validation, test = encoded_texts(cell, task)
    base = encoder_of(cell["model"], task.outputs, seed)
    before = _maps(base.state_dict())
    moments: list[dict[str, list[Change]]] = []

    def look(compiled: Any) -> None:
        after = compiled.merge().to_transformers().state_dict()
        by_map: dict[str, list[Change]] = defaultdict(list)
        for name, weight in before.items():
            by_map[_kind(name)].append(change(weight, after[name]))
        moments.append(by_map)

    compiled = fitted(cell, base, texts, look)
    correlations = [correlation(changes) for by_map in moments for changes in by_map.values()]
    last = [one for changes in moments[-1].values() for one in changes]
    return {
        "correlation": statistics.fmean(correlations),
        "magnitude": statistics.fmean(magnitude for magnitude, _ in last),
        "direction": statistics.fmean(direction for _, direction in last),
        "test": scores(compiled, test, task.outputs)[0],
        **chosen_by(compiled, validation, task.outputs),
    }


def change(before: Tensor, after: Tensor) -> Change:
    """Return the mean change of the magnitudes and of the directions of a weight.

    Args:
        before: float ``[out, in]``; a magnitude and a direction are those of a row, as in DoRA's code.
        after: the same after training.

    Returns:
        The mean difference of the rows' norms without signs, and the mean of one minus the cosine of the rows.
    """
    before, after = before.double(), after.double()
    norms, others = before.norm(dim=1), after.norm(dim=1)
    cosines = (before * after).sum(1) / (norms * others)
    return float((others - norms).abs().mean()), float((1 - cosines).mean())


def correlation(changes: Sequence[Change]) -> float:
    """Return Pearson's correlation of the two changes; 0 where one of them is the same in all layers."""
    magnitudes, directions = zip(*changes, strict=True)
    if len(set(magnitudes)) == 1 or len(set(directions)) == 1:
        return 0.0
    return statistics.correlation(magnitudes, directions)


def _maps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return copies of the weights of linear maps in the layers."""
    return {name: value.clone() for name, value in state.items() if ".layer." in name and value.dim() == 2}


def _kind(name: str) -> str:
    """Return the name of a weight without the numbers in it."""
    return ".".join(part for part in name.split(".") if not part.isdigit())
