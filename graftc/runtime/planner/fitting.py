"""The largest size that fits."""

from __future__ import annotations

from collections.abc import Callable


def largest(peak: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest size whose peak is within a budget, 0 where that of 1 is not.

    Peaks grow with sizes, and nearly in a straight line: sizes are tried where the line through the last two would meet
    the budget, and beside that; every third one halves what is left, as the line may be none.

    Args:
        peak: bytes for a size from 1.
        budget: bytes that there are.
        limit: the largest size that there is.
    """
    points = [(1, peak(1))]
    if points[0][1] > budget:
        return 0
    low, high, tries = 1, limit + 1, 0
    while high - low > 1:
        guess = _where(points[-2:], budget) if len(points) > 1 else 2
        if guess is None or tries % 3 == 2:
            guess = (low + high) // 2 if high <= limit else 2 * low
        guess = min(max(guess, low + 1), high - 1)
        points.append((guess, peak(guess)))
        tries += 1
        if points[-1][1] <= budget:
            low = guess
            points.sort(key=lambda point: abs(point[0] - low), reverse=True)
        else:
            high = guess
    return low


def _where(points: list[tuple[int, int]], budget: int) -> int | None:
    (first, below), (second, above) = points
    if first == second or below == above:
        return None
    return int(first + (budget - below) * (second - first) / (above - below))
