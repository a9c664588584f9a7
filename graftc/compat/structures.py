"""The structure of nested containers as text, for code that does without torch until it writes one."""

from __future__ import annotations

from typing import Any


def structure_text(value: Any) -> str:
    """Return the structure of nested containers in the form in which torch reads it back from a file.

    Only `torch.utils._pytree` writes and reads this form.
    """
    from torch.utils import _pytree

    return _pytree.treespec_dumps(_pytree.tree_flatten(value)[1])
