"""Which seed adapters start from where none is given."""

from __future__ import annotations

from typing import cast

import torch
from torch import distributed

__all__ = ["starting_seed"]


def starting_seed() -> int:
    """The seed that torch's random numbers were started from, so that `torch.manual_seed` and transformers' `set_seed`
    decide. Nothing is drawn.

    In an initialised process group it is that of rank 0 on all ranks: all of them have to call it.
    """
    own = torch.initial_seed()
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    held: list[int | None] = [own]
    distributed.broadcast_object_list(held, src=0)
    return cast("int", held[0])
