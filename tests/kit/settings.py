"""Settings of torch and graftc that hold for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from graftc.passes.core.ops import head_loss


@contextmanager
def one_thread() -> Iterator[None]:
    """Use one thread while the block runs, so that sums do not depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def small_chunks(patch: pytest.MonkeyPatch, rows: int = 3) -> None:
    """Compute losses in chunks of so many rows, however few they are."""
    patch.setattr(head_loss, "CHUNK_ROWS", {"cpu": rows})
    patch.setattr(head_loss, "CHUNK_BYTES", {"cpu": 1})
