"""Names of graph inputs that are cache tensors: the keys and values of earlier tokens.

``past_0_key`` and ``past_0_value`` belong to the text in the first layer, and ``cross_0_key`` and ``cross_0_value`` to
an encoder's output. Their axes are ``[batch, heads, length, width]``. In a cache of fixed length, ``past_seen`` is the
number of tokens that it contains, at the beginning of that axis.
"""

from __future__ import annotations

import re
from typing import Any

from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import expression

SEEN = "past_seen"
"""The input with the number of tokens in a cache of fixed length, ``int64[]``."""
_NAME = re.compile(r"(?P<kind>past|cross)_(?P<layer>\d+)_(?P<part>key|value)")


def is_past(name: str) -> bool:
    """Return whether an input is a cache tensor."""
    return _NAME.fullmatch(name) is not None


def of_cache(name: str) -> bool:
    """Return whether an input is part of a cache: one of its tensors, or the number of tokens in it."""
    return name == SEEN or is_past(name)


def is_cross(name: str) -> bool:
    """Return whether an input contains keys or values computed from an encoder's output."""
    return name.startswith("cross") and is_past(name)


def past_name(kind: str, layer: int, part: str) -> str:
    """Return the name of a cache tensor; its kind is ``past`` or ``cross``, and its part ``key`` or ``value``."""
    return f"{kind}_{layer}_{part}"


def past_place(name: str) -> tuple[str, int, str]:
    """Return the kind, the layer and the part encoded in a name from `past_name`."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return match["kind"], int(match["layer"]), match["part"]


def past_length(program: Program) -> Any:
    """Return the symbol for the number of earlier tokens in the text, or None for a graph without a cache.

    For a cache of fixed length, it is the symbol for that length.
    """
    for node in program.placeholders():
        if is_past(str(node.target)) and not is_cross(str(node.target)):
            return expression(node.meta["val"].shape[2])
    return None
