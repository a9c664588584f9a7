"""The memory that training really takes: every allocation of torch, the model's own tensors included."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

_MARK = "the second step"


def peak_of_training(
    compiled: Any,
    batch: dict[str, torch.Tensor],
    optimiser_of: Callable[[Any], torch.optim.Optimizer],
    shard: Callable[[Any], None] | None = None,
) -> int:
    """Return the peak of bytes in the second step of training, including the model, its state and its batch.

    Args:
        compiled: a compiled model, of which a copy is trained.
        batch: inputs with labels.
        optimiser_of: a function that returns an optimiser of the copy.
        shard: a function that distributes the copy over processes.
    """
    torch.manual_seed(0)
    gc.collect()  # memory allocated before this profile but freed during it would be subtracted
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True) as profiler:
        model = copy.deepcopy(compiled).train()
        mine = {name: tensor.clone() for name, tensor in batch.items()}
        if shard is not None:
            shard(model)
        optimiser = optimiser_of(model)
        for number in range(2):
            with record_function(_MARK if number else "the first step"):
                model(**mine).loss.backward()
                optimiser.step()
                optimiser.zero_grad()
    kineto = profiler.profiler
    assert kineto is not None and kineto.kineto_results is not None
    events = kineto.kineto_results.events()
    begin = next(event.start_ns() for event in events if event.name() == _MARK)
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    level = peak = 0
    for at, change in sorted(changes, key=lambda change: change[0]):
        level += change
        if at >= begin:
            peak = max(peak, level)
    return peak
