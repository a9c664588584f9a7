"""Turns of contestants: make all that can run ready, then time all of them a step at a time, round after round."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

from benchmarks.train.contestants import UnavailableError


class Named(Protocol):
    """An entry with a name."""

    @property
    def name(self) -> str:
        """The unique name of the entry."""


E = TypeVar("E", bound=Named)
R = TypeVar("R")


def all_ready(
    entries: Sequence[E], make: Callable[[E], R], tell: Callable[[str], None]
) -> tuple[list[R], dict[str, str]]:
    """Return the results of ``make`` for the entries that can run, and by name the reasons why others cannot."""
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
    """Give every contestant a turn in each round, starting with a different one each time.

    Garbage is collected between rounds.

    Args:
        ready: the contestants in the order of their turns.
        rounds: the number of turns of each.
        turn: runs one turn of a contestant, given the number of the round, from 0.
        tell: called with a line after every round.
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
