"""Turns: everybody who can run is made ready, and then all are timed a step at a time, round after round."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from benchmarks.train.contestants import UnavailableError


class Named(Protocol):
    """Who runs."""

    @property
    def name(self) -> str:
        """Unique."""


E = TypeVar("E", bound=Named)
R = TypeVar("R")


def all_ready(
    entries: Sequence[E], make: Callable[[E], R], tell: Callable[[str], None]
) -> tuple[list[R], dict[str, str]]:
    """What ``make`` gives for each entry, and by the name of each that could not run, why."""
    ready: list[R] = []
    skipped: dict[str, str] = {}
    for entry in entries:
        try:
            ready.append(make(entry))
        except UnavailableError as reason:
            skipped[entry.name] = str(reason)
            tell(f"{entry.name}: skipped: {reason}")
    return ready, skipped


def in_turns(ready: Sequence[R], rounds: int, turn: Callable[[R, int], None], tell: Callable[[str], None]) -> None:
    """Give everybody a turn in each round, which another one begins each time. Garbage is collected between rounds.

    Args:
        ready: in the order of their turns.
        rounds: how many turns each has.
        turn: takes one, of the round of this number, from 0.
        tell: told of every round.
    """
    gc.collect()
    gc.disable()
    try:
        for number in range(rounds):
            first = number % max(len(ready), 1)
            for one in [*ready[first:], *ready[:first]]:
                turn(one, number)
            gc.collect()
            tell(f"round {number + 1} of {rounds}")
    finally:
        gc.enable()
