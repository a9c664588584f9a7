"""Names of graph inputs that are tensors of a cache: keys and values of earlier tokens.

``past_0_key`` and ``past_0_value`` are those of the first layer's text; ``cross_0_key`` and so on are those of an
encoder's output. Their axes are ``[batch, heads, length, width]``.
"""

from __future__ import annotations

import re
from typing import Any

from graftc.passes.core.ir.program import Program
from graftc.passes.core.ir.shapes import expression

_NAME = re.compile(r"(?P<kind>past|cross)_(?P<layer>\d+)_(?P<part>key|value)")


def is_past(name: str) -> bool:
    """Return whether an input is a tensor of a cache."""
    return _NAME.fullmatch(name) is not None


def is_cross(name: str) -> bool:
    """Return whether an input has keys or values of an encoder's output."""
    return name.startswith("cross") and is_past(name)


def past_name(kind: str, layer: int, part: str) -> str:
    """Return the name of a tensor of a cache, of kind ``past`` or ``cross``, whose part is ``key`` or ``value``."""
    return f"{kind}_{layer}_{part}"


def past_place(name: str) -> tuple[str, int, str]:
    """Return the kind, the layer and the part of a name that `past_name` made."""
    match = _NAME.fullmatch(name)
    assert match is not None
    return match["kind"], int(match["layer"]), match["part"]


def past_length(program: Program) -> Any:
    """Return the symbol that counts the earlier tokens of the text; None for a graph without a cache."""
    for node in program.placeholders():
        if is_past(str(node.target)) and not is_cross(str(node.target)):
            return expression(node.meta["val"].shape[2])
    return None
