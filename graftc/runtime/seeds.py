"""The default seed of adapters, and seeding the random numbers of a training."""

from __future__ import annotations

import random
from typing import cast

import numpy
import torch
from torch import distributed


def starting_seed() -> int:
    """Return the seed of torch's random numbers, which `torch.manual_seed` and transformers' `set_seed` determine.

    No random number is drawn. In an initialised process group the seed is that of rank 0 on all ranks: all of them have
    to call this function.
    """
    own = torch.initial_seed()
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    shared: list[int | None] = [own]
    distributed.broadcast_object_list(shared, src=0)
    return cast("int", shared[0])


def seed_everything(seed: int) -> None:
    """Seed the random numbers of Python, NumPy and torch, on every device, as transformers' `set_seed` does.

    That function imports installed libraries such as PEFT and bitsandbytes; this one does not.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
