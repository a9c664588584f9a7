"""Add what was trained on two tasks apart to one model (Ansell et al. 2022, LT-SFT)."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from experiments.combined import tasks_in
from experiments.encoder import encoder_of
from experiments.probing import chosen_by, encoded_texts, fitted, scores
from experiments.tasks import HEAD, task_of


def figures(cell: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a cell.

    ``alone`` is the mean accuracy of models trained on one task each, ``composed`` that of one encoder to which the
    changes of all were added, with each task's own head. ``changed`` is the mean fraction of the encoder's values that
    a task changes.

    Args:
        cell: as for `experiments.classifying.figures`; its ``task`` is a name from `experiments.combined`.
    """
    settings, seed = cell["settings"], cell["seed"]
    untrained = encoder_of(cell["model"], 2, seed)
    start = {name: value.clone() for name, value in untrained.state_dict().items()}
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in start.items() if _is_added(name)}
    models, alone, choices, changed = [], list[float](), list[dict[str, float]](), list[float]()
    for name in tasks_in(settings["task"]):
        task = task_of({**settings, "task": name}, seed)
        texts, validation, test = encoded_texts(cell, task)
        base = encoder_of(cell["model"], task.outputs, seed)
        model = fitted(cell, base, texts).merge().to_transformers().eval()
        differences = {key: model.state_dict()[key].double() - start[key].double() for key in total}
        for key, value in differences.items():
            total[key] += value
        changed.append(_nonzero(differences))
        alone.append(scores(model, test, task.outputs)[0])
        choices.append(chosen_by(model, validation, task.outputs))
        models.append((model, test, task.outputs))
    sums = {key: (start[key].double() + value).to(start[key].dtype) for key, value in total.items()}
    composed = list[float]()
    for model, test, outputs in models:
        model.load_state_dict(sums, strict=False)
        composed.append(scores(model, test, outputs)[0])
    return {
        "alone": statistics.fmean(alone),
        "composed": statistics.fmean(composed),
        "kept": statistics.fmean(composed) - statistics.fmean(alone),
        "changed": statistics.fmean(changed),
        **{key: statistics.fmean(choice[key] for choice in choices) for key in choices[0]},
    }


def _is_added(name: str) -> bool:
    return not name.startswith(f"{HEAD}.")


def _nonzero(differences: Mapping[str, Tensor]) -> float:
    """Return the fraction of values that differ from zero."""
    counts = [(int(value.count_nonzero()), value.numel()) for value in differences.values()]
    return sum(some for some, _ in counts) / sum(all_values for _, all_values in counts)
