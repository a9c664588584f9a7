"""Results that are kept for equal arguments are not given to others."""

from __future__ import annotations

from typing import Any

import pytest

from graftc.compiler.roles.patterns import hashable


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], [2, 1]),
        ([1], [[1]]),
        ({"dim": 1}, {"dim": 2}),
        ({"dim": 1}, {"axis": 1}),
        ({"dim": 1}, {}),
        (slice(0, 4), slice(0, 5)),
        (slice(0, 4), (0, 4, None)),
        (1, 1.0),
        (1, True),
        (0, None),
    ],
)
def test_keys_differ_as_arguments_do(one: Any, other: Any) -> None:
    """They tell positions, keywords, slices and types apart, and depend on nothing else."""
    first, second, again = (hashable([value], lambda leaf: leaf) for value in (one, other, one))
    assert first == again and hash(first) == hash(again) and first != second
