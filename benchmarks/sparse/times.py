"""The times of training steps, in alternated rounds of one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.hardware import Stopwatch
from benchmarks.sparse.entries import CYCLE, WINDOW, Entry, Training
from benchmarks.train.models import Base
from benchmarks.turns import all_ready, in_turns

__all__ = ["Timed", "contest", "cycle_mean", "ordinary", "ordinary_median"]

WARMUP = 2


@dataclass
class Timed:
    """The times of one entry.

    Attributes:
        entry: the entry.
        loss: the loss of the first step.
        seconds: the time of every round, by CUDA events on a GPU, otherwise by the wall clock.
        processor: the processor time of all threads in every round.
        numbers: the numbers of the timed steps, from 1; steps that are not timed count.
    """

    entry: Entry
    loss: float
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def over(self, other: Timed) -> list[float]:
        """Return the ratios of the rounds, each between two steps that ran close together."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]

    def processor_over(self, other: Timed) -> list[float]:
        """Return the same ratios for processor time."""
        return [a / b for a, b in zip(self.processor, other.processor, strict=True)]


def ordinary(number: int) -> bool:
    """Return whether the step of this number, from 1, neither gathers gradients nor replaces entries."""
    return (number - 1) % CYCLE >= WINDOW


def ordinary_median(values: Sequence[float], numbers: Sequence[int]) -> float:
    """Return the median of the ordinary steps, or of all steps if none is ordinary."""
    chosen = [value for value, number in zip(values, numbers, strict=True) if ordinary(number)]
    return statistics.median(chosen or values)


def cycle_mean(values: Sequence[float], numbers: Sequence[int]) -> float | None:
    """Return the mean over the places of a cycle of their medians; None if the rounds do not cover a cycle."""
    by_place = [
        [value for value, number in zip(values, numbers, strict=True) if number % CYCLE == place]
        for place in range(CYCLE)
    ]
    return statistics.fmean(map(statistics.median, by_place)) if all(by_place) else None


def contest(
    entries: Sequence[Entry],
    base: Base,
    checkpointing: bool,
    rounds: int,
    *,
    warmup: int = WARMUP,
    tell: Callable[[str], None] = print,
) -> tuple[list[Timed], dict[str, str]]:
    """Put every entry on the base, then give all of them steps in turns.

    Args:
        entries: the entries in the order of their turns; each round starts with a different one.
        base: the base that they share, except for an entry that trains all of it.
        checkpointing: whether activations are checkpointed.
        rounds: the number of timed steps of each entry.
        warmup: the number of steps of each before them.
        tell: called with lines on the progress.

    Returns:
        The measured times, and the reason by the name of each entry that could not run.
    """

    def make(entry: Entry) -> tuple[Timed, Training]:
        training = entry.make(base, checkpointing)
        with torch.no_grad():
            timed = Timed(entry, float(training.loss()))
        for _ in range(warmup):
            training.step()
        return timed, training

    device = base.labels.device
    ready, skipped = all_ready(entries, make, tell)
    in_turns(ready, rounds, lambda one, number: _timed(*one, device, number=warmup + number + 1), tell)
    return [timed for timed, _ in ready], skipped


def _timed(found: Timed, training: Training, device: torch.device, number: int) -> None:
    watch, processor = Stopwatch(device), time.process_time()
    training.step()
    watch.mark()
    found.seconds += watch.seconds()
    found.processor.append(time.process_time() - processor)
    found.numbers.append(number)


def mismatches(found: Sequence[Timed], tolerance: float = 1e-4) -> Iterator[str]:
    """Yield a line for each entry whose first loss must equal its peer's but does not."""
    losses = {timed.entry.name: timed.loss for timed in found}
    for timed in found:
        expected = losses.get(timed.entry.peer or "")
        if timed.entry.exact and expected is not None:
            difference = abs(timed.loss - expected) / abs(expected)
            if not difference <= tolerance:
                yield f"{timed.entry.name}: its loss is not its peer's: {difference:.1e} apart"
