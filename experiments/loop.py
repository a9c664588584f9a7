"""The training loop of the experiments."""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

import graftc
from experiments.sources import Batch

WARMUP, LARGEST_NORM = 0.1, 1.0
OPTIMISERS: Mapping[str, Any] = {
    "adamw": torch.optim.AdamW,
    "aged": graftc.optim.AgedAdamW,
    "sm3": graftc.optim.SM3,
}


class LoopTimes:
    """Seconds and milliseconds of parts of a cell."""

    def __init__(self) -> None:
        self.values: dict[str, float] = {}

    def record(self, name: str, started: float) -> None:
        """Record the seconds since a moment of `time.perf_counter`."""
        self.values[name] = round(time.perf_counter() - started, 2)


def train(
    compiled: Any,
    batches: Iterator[Batch],
    steps: int,
    rate: float,
    optimiser: str,
    overrides: Mapping[str, Any],
    times: LoopTimes,
) -> list[float]:
    """Train at a rate that rises over a tenth of the steps and then falls to zero, and return the loss of every step.

    Args:
        compiled: the model.
        batches: at least ``steps`` batches with labels.
        steps: the number of steps.
        rate: the highest learning rate.
        optimiser: a key of `OPTIMISERS`.
        overrides: as for `graftc.optim.param_groups`.
        times: where the median of a step's milliseconds goes, without the first two, in which graphs are made.
    """
    groups = graftc.optim.param_groups(compiled, rate, overrides=overrides)
    stepper = OPTIMISERS[optimiser](groups)
    rise = max(1, round(steps * WARMUP))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        stepper, lambda step: min((step + 1) / rise, (steps - step) / max(1, steps - rise))
    )
    trained = [p for group in groups for p in group["params"]]
    losses, seconds = list[float](), list[float]()
    compiled.begin(steps)
    for _ in range(steps):
        started = time.perf_counter()
        loss = compiled(**next(batches)).loss
        (loss + compiled.extra_loss()).backward()
        torch.nn.utils.clip_grad_norm_(trained, LARGEST_NORM)
        stepper.step()
        compiled.after_step()
        schedule.step()
        stepper.zero_grad()
        losses.append(float(loss.detach()))
        seconds.append(time.perf_counter() - started)
    times.values["step_ms"] = round(1e3 * statistics.median(seconds[2:] or seconds), 1)
    return losses
