"""What training steps take, in alternated rounds of one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from benchmarks.sparse.entries import CYCLE, WINDOW, Entry, Training
from benchmarks.train.models import Base
from benchmarks.turns import all_ready, in_turns

__all__ = ["Timed", "contest", "cycle_mean", "ordinary", "ordinary_median"]

WARMUP = 2


@dataclass
class Timed:
    """What one entry took.

    Attributes:
        entry: which.
        loss: of the first step.
        seconds: of every round, on the clock.
        processor: of every round, of all threads' processor time.
        numbers: of the steps, from 1, those that were not timed counted.
    """

    entry: Entry
    loss: float
    seconds: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def over(self, other: Timed) -> list[float]:
        """Ratios of the rounds, each of two steps that were a moment apart."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]

    def processor_over(self, other: Timed) -> list[float]:
        """The same of processor time."""
        return [a / b for a, b in zip(self.processor, other.processor, strict=True)]


def ordinary(number: int) -> bool:
    """Whether the step of this number, from 1, neither gathers gradients nor replaces entries."""
    return (number - 1) % CYCLE >= WINDOW


def ordinary_median(values: Sequence[float], numbers: Sequence[int]) -> float:
    """The median of ordinary steps, or of all where none was."""
    found = [value for value, number in zip(values, numbers, strict=True) if ordinary(number)]
    return statistics.median(found or values)


def cycle_mean(values: Sequence[float], numbers: Sequence[int]) -> float | None:
    """The mean over a cycle of each place's median over the cycles; None where the rounds are fewer than a cycle."""
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
        entries: in the order of their turns; the first turn of each round goes to another one each time.
        base: what they share, but for what trains all of it.
        checkpointing: of activations.
        rounds: steps of each that are timed.
        warmup: steps of each before.
        tell: told of what is going on.

    Returns:
        What was measured, and by the name of each entry that could not run, why.
    """

    def make(entry: Entry) -> tuple[Timed, Training]:
        training = entry.make(base, checkpointing)
        with torch.no_grad():
            found = Timed(entry, float(training.loss()))
        for _ in range(warmup):
            training.step()
        return found, training

    device = base.labels.device
    ready, skipped = all_ready(entries, make, tell)
    in_turns(ready, rounds, lambda one, number: _timed(*one, device, number=warmup + number + 1), tell)
    return [found for found, _ in ready], skipped


def _timed(found: Timed, training: Training, device: torch.device, number: int) -> None:
    _wait(device)
    processor, start = time.process_time(), time.perf_counter()
    training.step()
    _wait(device)
    end = time.perf_counter()
    found.processor.append(time.process_time() - processor)
    found.seconds.append(end - start)
    found.numbers.append(number)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def mismatches(found: Sequence[Timed], tolerance: float = 1e-4) -> Iterator[str]:
    """Entries whose first loss is not their peer's although it has to be."""
    losses = {timed.entry.name: timed.loss for timed in found}
    for timed in found:
        expected = losses.get(timed.entry.peer or "")
        if timed.entry.exact and expected is not None:
            difference = abs(timed.loss - expected) / abs(expected)
            if not difference <= tolerance:
                yield f"{timed.entry.name}: its loss is not its peer's: {difference:.1e} apart"
