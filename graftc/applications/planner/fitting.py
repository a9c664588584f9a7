"""Search for the largest size that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def largest(peak: Callable[[int], int], budget: int, limit: int, first: int = 1) -> int:
    """Return the largest size whose peak is within a budget, or 0 if that of size 1 is not.

    Peaks grow with sizes, almost linearly: each guess is where the line through two other sizes meets the budget, or
    close to that. Every third guess halves the remaining range, as peaks may not be on a line.

    Args:
        peak: a function that returns the bytes for a size, from 1.
        budget: the bytes that are available.
        limit: the largest size that is possible.
        first: the size to begin with.
    """
    low, high, tries = 0, limit + 1, 0
    points: dict[int, int] = {}
    guess = min(first, limit)
    while high - low > 1:
        points[guess] = peak(guess)
        tries += 1
        if points[guess] <= budget:
            low = guess
        else:
            high = guess
        # Sizes far above those tried so far take time and reveal little.
        most = high - 1 if high <= limit else min(limit, 4 * max(low, 1))
        middle = (low + high) // 2 if high <= limit else 2 * max(low, 1)
        guess = middle if tries % 3 == 0 else _where(points, low, high, budget, middle)
        guess = min(max(guess, low + 1), most)
    return low


def _where(points: Mapping[int, int], low: int, high: int, budget: int, otherwise: int) -> int:
    """Return where a line through the two sizes nearest to the budget meets it, or ``otherwise`` if none does."""
    below, above = sorted(n for n in points if n <= low)[-2:], sorted(n for n in points if n >= high)[:2]
    ends = [*below[-1:], *above[:1]] if below and above else [*below, *above]
    if len(ends) < 2 or points[ends[0]] == points[ends[1]]:
        return otherwise
    first, second = ends
    return int(first + (budget - points[first]) * (second - first) / (points[second] - points[first]))
