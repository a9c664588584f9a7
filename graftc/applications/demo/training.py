"""A plain training loop, prediction, and the two scores that the demo prints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graftc.applications.demo.data import Batched, evaluation_batches
from graftc.records.applications.demo import Scores

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class TrainingRun:
    """The loss of each step, and the total duration in seconds."""

    losses: tuple[float, ...]
    seconds: float


def score(predicted: Sequence[int], actual: Sequence[int], classes: int) -> Scores:
    """Return accuracy and macro-F1 over ``classes`` classes; a class neither predicted nor present has an F1 of 0.

    Raises:
        ValueError: if the two sequences differ in length, or are empty.
    """
    if len(predicted) != len(actual) or not actual:
        raise ValueError(f"{len(predicted)} predictions for {len(actual)} examples")
    right, said, present = [0] * classes, [0] * classes, [0] * classes
    for p, a in zip(predicted, actual, strict=True):
        said[p] += 1
        present[a] += 1
        right[a] += p == a
    f1 = [2 * r / (s + t) if s + t else 0.0 for r, s, t in zip(right, said, present, strict=True)]
    return Scores(sum(right) / len(actual), sum(f1) / classes)


_WEIGHT_DECAY, _WARMUP, _LARGEST_NORM = 0.01, 0.1, 1.0


def train(
    model: nn.Module,
    batches: Iterator[dict[str, torch.Tensor]],
    steps: int,
    lr: float,
    *,
    on_step: Callable[[int, float], None] | None = None,
) -> TrainingRun:
    """Train all parameters that require a gradient with AdamW.

    The learning rate warms up linearly over a tenth of the steps and then decays linearly to zero. Weight decay applies
    to parameters with two or more dimensions, and the joint norm of all gradients is clipped to 1.

    Args:
        model: a model that is called as ``model(**batch)`` and whose output has a scalar ``loss``.
        batches: at least ``steps`` batches, with labels.
        steps: the number of optimiser steps.
        lr: the peak learning rate.
        on_step: a function that is called after each step with its number, from 1, and its loss.

    Raises:
        FloatingPointError: if the loss of a step is not finite.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": _WEIGHT_DECAY},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=lr)
    rise = max(1, round(steps * _WARMUP))

    def pace(step: int) -> float:
        return min((step + 1) / rise, max(0.0, (steps - step) / max(1, steps - rise)))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, pace)
    losses: list[float] = []
    start = time.perf_counter()
    model.train()
    for step in range(1, steps + 1):
        loss = model(**next(batches)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, _LARGEST_NORM)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if losses[-1] != losses[-1] or losses[-1] in (float("inf"), float("-inf")):
            raise FloatingPointError(f"the loss of step {step} is {losses[-1]}")
        if on_step is not None:
            on_step(step, losses[-1])
    return TrainingRun(tuple(losses), time.perf_counter() - start)


def predict(
    forward: Callable[[dict[str, torch.Tensor]], torch.Tensor],
    data: Batched,
    *,
    size: int = 64,
    on_batch: Callable[[int], None] | None = None,
) -> torch.Tensor:
    """Return the logits of every example, float32 ``[examples, classes]``, in the order of ``data``.

    Args:
        forward: a function that maps a batch without labels to logits ``[batch, classes]``.
        size: the number of examples in a batch; each batch is padded to its longest text.
        on_batch: a function that is called after each batch with its number of examples.
    """
    rows: list[int] = []
    parts: list[torch.Tensor] = []
    with torch.no_grad():
        for some, batch in evaluation_batches(data, size):
            parts.append(forward(batch).float().cpu())
            rows += some
            if on_batch is not None:
                on_batch(len(some))
    logits = torch.cat(parts)
    out = torch.empty_like(logits)
    out[torch.tensor(rows)] = logits
    return out
