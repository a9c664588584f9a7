"""Which seed adapters start from where none is given, and seeding the random numbers of a training."""

from __future__ import annotations

import random
from typing import cast

import numpy
import torch
from torch import distributed

__all__ = ["seed_everything", "starting_seed"]


def starting_seed() -> int:
    """The seed that torch's random numbers were started from, so that `torch.manual_seed` and transformers' `set_seed`
    decide. Nothing is drawn.

    In an initialised process group it is that of rank 0 on all ranks: all of them have to call it.
    """
    own = torch.initial_seed()
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    shared: list[int | None] = [own]
    distributed.broadcast_object_list(shared, src=0)
    return cast("int", shared[0])


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch, on every device, as transformers' `set_seed` does. That one
    imports what it finds installed, PEFT and bitsandbytes for instance."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
