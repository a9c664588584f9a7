"""The structure of nested containers as text, for code that does not import torch until it writes a structure."""

from __future__ import annotations

from typing import Any


def structure_text(value: Any) -> str:
    """Return the structure of nested containers in the format in which torch reads it back from a file.

    Only `torch.utils._pytree` writes and reads this format.
    """
    from torch.utils import _pytree

    return _pytree.treespec_dumps(_pytree.tree_flatten(value)[1])
