"""Find the mask that tells a value's real tokens from padding."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from graftc.passes.core.build.nodes import Nodes
from graftc.passes.core.ir.shapes import expression


def token_mask(build: Nodes, sizes: Sequence[Any]) -> fx.Node | None:
    """Return the attention mask, which marks the real tokens of ``[rows, tokens]`` values; None without one.

    Args:
        build: the builder of the Program.
        sizes: the sizes of these axes, as integers or expressions.
    """
    for spec, node in zip(build.program.inputs, build.program.placeholders(), strict=True):
        if spec.name.endswith("attention_mask") and [expression(s) for s in node.meta["val"].shape] == list(sizes):
            return node
    return None
