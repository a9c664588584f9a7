"""The default seed for adapters, and seeding of random number generators for training."""

from __future__ import annotations

import random
from typing import cast

import numpy
import torch
from torch import distributed


def starting_seed() -> int:
    """Return the seed of torch's random number generator, as set by `torch.manual_seed` or transformers' `set_seed`.

    No random number is drawn. In an initialised process group, all ranks get the seed of rank 0, so all of them must
    call this function.
    """
    own = torch.initial_seed()
    if not (distributed.is_available() and distributed.is_initialized()):
        return own
    shared: list[int | None] = [own]
    distributed.broadcast_object_list(shared, src=0)
    return cast("int", shared[0])


def seed_everything(seed: int) -> None:
    """Seed the generators of Python, NumPy and torch, on every device, as transformers' `set_seed` does.

    Unlike `set_seed`, this function does not import installed libraries such as PEFT and bitsandbytes.
    """
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
