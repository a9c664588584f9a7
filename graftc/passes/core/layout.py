"""Layouts: how the Store holds a weight that is seen as ``[..., out, in]``."""

from __future__ import annotations

from enum import StrEnum

import torch
from torch import Tensor


class Layout(StrEnum):
    """How the Store holds a weight that is seen as ``[..., out, in]``."""

    ROWS = "rows"
    """As it is seen."""
    COLUMNS = "columns"
    """The last two axes swapped: ``[..., in, out]``."""
    KERNEL = "kernel"
    """A convolution's ``[out, in, *kernel]``; its columns are the entries of a patch."""
    PLAIN = "plain"
    """No matrix: a tensor that is replaced as it is, along its first axis."""

    @property
    def axis(self) -> int:
        """Which axis of the stored tensor counts the rows."""
        return {Layout.ROWS: -2, Layout.COLUMNS: -1}.get(self, 0)

    def orient(self, stored: Tensor) -> Tensor:
        """The weight as ``[..., out, in]``, a view."""
        if self is Layout.COLUMNS:
            return stored.transpose(-1, -2)
        return stored.flatten(1) if self is Layout.KERNEL else stored

    def restore(self, oriented: Tensor, shape: torch.Size) -> Tensor:
        """The stored form of an oriented weight."""
        if self is Layout.COLUMNS:
            return oriented.transpose(-1, -2)
        return oriented.reshape(shape) if self is Layout.KERNEL else oriented
