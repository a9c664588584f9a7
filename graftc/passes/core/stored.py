"""Stored rows: rows of a weight, along whichever axis of the stored tensor counts them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graftc.passes.core.layout import Layout
from graftc.passes.core.rows import Rows


@dataclass(frozen=True)
class StoredRows:
    """Rows of a weight in the tensor that the Store holds.

    Attributes:
        rows: which.
        layout: how the tensor holds them: `PLAIN` along its first axis, `COLUMNS` and `ROWS` along one of its last two.
            All of a tensor is always `PLAIN`, so that every reader of it means the same.
    """

    rows: Rows
    layout: Layout = Layout.PLAIN

    @classmethod
    def of(cls, rows: Rows, layout: Layout, shape: torch.Size) -> StoredRows:
        """Rows of an oriented weight that is stored in a layout with these sizes."""
        axis = layout.axis
        if rows.whole:
            return cls.every(shape)
        return cls(rows, Layout.PLAIN if axis % len(shape) == 0 else layout)

    @classmethod
    def every(cls, shape: Sequence[int]) -> StoredRows:
        """All of a tensor of these sizes."""
        return cls(Rows(shape[0] if shape else 1))

    @property
    def axis(self) -> int:
        """Which axis of the stored tensor counts them."""
        return self.layout.axis

    @property
    def whole(self) -> bool:
        """Whether these are all of the tensor."""
        return self.rows.whole

    def overlaps(self, other: StoredRows) -> bool:
        """Whether any element of the tensor is in both: rows along different axes always meet."""
        return self.layout is not other.layout or self.rows.overlaps(other.rows)

    def take(self, stored: Tensor) -> Tensor:
        """Them, as the tensor holds them."""
        return self.rows.take(stored, self.axis)

    def put(self, stored: Tensor, own: Tensor) -> Tensor:
        """A copy of the tensor with others in their place."""
        return self.rows.put(stored, own, self.axis)

    def __str__(self) -> str:
        return "all" if self.whole else f"rows {self.rows}"
