"""Places of labels and of points in a row, so that none covers another."""

from __future__ import annotations

from collections.abc import Sequence


def spread(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Return the centres of intervals that do not overlap, in the order of and as near as possible to those wanted.

    Those that would overlap are moved as a group, whose mean stays where it is wanted.

    Args:
        wanted: the centres, rising.
        widths: the width of each interval, with the gap to its neighbours.
    """
    # Of each group: its members, the sum of where they want its start to be, and their offsets from that start.
    groups: list[tuple[list[int], float, list[float]]] = []
    ends: list[float] = []
    for number, (centre, width) in enumerate(zip(wanted, widths, strict=True)):
        members, total, offsets, length = [number], centre - width / 2, [width / 2], width
        while groups and ends[-1] > total / len(members):
            before, before_total, before_offsets = groups.pop()
            ends.pop()
            shift = sum(widths[i] for i in before)
            total = before_total + total - shift * len(members)
            members, offsets = before + members, before_offsets + [shift + offset for offset in offsets]
            length += shift
        groups.append((members, total, offsets))
        ends.append(total / len(members) + length)
    return [total / len(members) + offset for members, total, offsets in groups for offset in offsets]
