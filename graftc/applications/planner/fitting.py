"""Search for the largest size that fits into a budget."""

from __future__ import annotations

from collections.abc import Callable, Mapping


def largest(peak: Callable[[int], int], budget: int, limit: int, first: int = 1) -> int:
    """Return the largest size whose peak is within a budget, or 0 if even size 1 exceeds it.

    Peaks grow almost linearly with size, so each guess is at or near the point where a line through two known peaks
    meets the budget. Every third guess bisects the remaining range, in case the growth is not linear.

    Args:
        peak: a function that returns the peak memory, in bytes, for a size of at least 1.
        budget: the number of bytes available.
        limit: the largest possible size.
        first: the size to try first.
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
        # Trying sizes far above the known ones takes time and reveals little.
        most = high - 1 if high <= limit else min(limit, 4 * max(low, 1))
        middle = (low + high) // 2 if high <= limit else 2 * max(low, 1)
        guess = middle if tries % 3 == 0 else _where(points, low, high, budget, middle)
        guess = min(max(guess, low + 1), most)
    return low


def _where(points: Mapping[int, int], low: int, high: int, budget: int, otherwise: int) -> int:
    """Return the size at which a line through the two points nearest to the budget meets it, or else ``otherwise``."""
    below, above = sorted(n for n in points if n <= low)[-2:], sorted(n for n in points if n >= high)[:2]
    ends = [*below[-1:], *above[:1]] if below and above else [*below, *above]
    if len(ends) < 2 or points[ends[0]] == points[ends[1]]:
        return otherwise
    first, second = ends
    return int(first + (budget - points[first]) * (second - first) / (points[second] - points[first]))
