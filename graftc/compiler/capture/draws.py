"""Random numbers that do not depend on what was drawn before them, so that a model and its graph draw the same."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

from graftc.passes.core.ir.program import is_random

aten = torch.ops.aten
_SEED = 20


def draws(node: fx.Node) -> bool:
    """Whether a node draws random numbers; attention does where it drops something."""
    target = node.target
    if target is aten.scaled_dot_product_attention.default:
        dropped = node.args[4] if len(node.args) > 4 else node.kwargs.get("dropout_p", 0.0)
        return bool(dropped != 0)
    return is_random(node)


class _EachFromTheSeed(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Every draw starts from the same seed, so what it gives does not depend on how many there were before it. A graph
    has only those that its outputs depend on."""

    def __init__(self, seed: Callable[[], None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._seed = seed

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            self._seed()
        return func(*args, **(kwargs or {}))


@contextmanager
def same_draws(device: torch.device, wanted: bool) -> Iterator[None]:
    """Inside, random numbers depend on their kind and shape only; afterwards the random states are as before.

    Args:
        device: where they are drawn, beside the CPU.
        wanted: whether anything that counts is drawn.
    """
    own = [] if device.type == "cpu" else [device]
    module = torch.get_device_module(device)
    before = random.getstate()
    numpy = sys.modules.get("numpy")
    numpys = numpy.random.get_state() if numpy is not None else None

    def seed() -> None:
        torch.default_generator.manual_seed(_SEED)
        if own:
            module.manual_seed(_SEED)

    with torch.random.fork_rng(devices=own, device_type=device.type if own else "cuda"):
        seed()
        random.seed(_SEED)
        if numpy is not None:
            numpy.random.seed(_SEED)
        try:
            if wanted:
                with _EachFromTheSeed(seed):
                    yield
            else:
                yield
        finally:
            random.setstate(before)
            if numpy is not None:
                numpy.random.set_state(numpys)
