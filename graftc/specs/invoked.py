"""Adaptations that act on a row of a batch from an invocation on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING


class Invoked:
    """Mixin for the spec of a method that acts on a row only from an invocation, a sequence of token ids, on.

    Its graphs have an input for the positions, and keys and values of earlier tokens are the base's.
    """

    if TYPE_CHECKING:
        name: str | None
        invocation: Sequence[int]


def start_input(owner: str) -> str:
    """Return the name of the input with the position of each row's first adapted token.

    Args:
        owner: the adaptation, or the bank or average of parameters that it is a member of.
    """
    return f"{owner}_start"
