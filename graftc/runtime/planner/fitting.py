"""The largest size that fits."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def largest(peak: Callable[[int], int], budget: int, limit: int, first: int = 1) -> int:
    """The largest size whose peak is within a budget, 0 where that of 1 is not.

    Peaks grow with sizes, and nearly in a straight line: sizes are tried where the line through two others meets the
    budget, and beside that. Every third one halves what is left, as the line may be none.

    Args:
        peak: bytes for a size from 1.
        budget: bytes that there are.
        limit: the largest size that there is.
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
        # Far above what has been tried, sizes cost time and say little.
        most = high - 1 if high <= limit else min(limit, 4 * max(low, 1))
        middle = (low + high) // 2 if high <= limit else 2 * max(low, 1)
        guess = middle if tries % 3 == 0 else _where(points, low, high, budget, middle)
        guess = min(max(guess, low + 1), most)
    return low


def _where(points: Mapping[int, int], low: int, high: int, budget: int, otherwise: int) -> int:
    """Where a line through the two sizes nearest to the budget meets it."""
    below, above = sorted(n for n in points if n <= low)[-2:], sorted(n for n in points if n >= high)[:2]
    ends = [*below[-1:], *above[:1]] if below and above else [*below, *above]
    if len(ends) < 2 or points[ends[0]] == points[ends[1]]:
        return otherwise
    first, second = ends
    return int(first + (budget - points[first]) * (second - first) / (points[second] - points[first]))
