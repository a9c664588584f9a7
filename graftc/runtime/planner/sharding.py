"""What FSDP2 takes beside shards: whole tensors of the layers in flight, and gradients on their way."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod

from torch import nn

from graftc.runtime.model.simulated_step import Simulation, shard_of


def shard_bytes(tensor: nn.Parameter, processes: int) -> int:
    """Bytes of the largest shard."""
    return prod(shard_of(tensor, processes)) * tensor.itemsize


def communication(simulation: Simulation, processes: int, device: str) -> int:
    """Bytes of communication buffers at the peak of a step, a unit for each layer and one for the rest.

    The rest is whole from its forward to its backward pass. Of layers two are: the one that runs, and the one that is
    gathered meanwhile; on a CPU, gloo has a copy of the latter for itself. Gradients of one unit are there as a whole
    twice: as they were made, and in the order in which they are sent.

    Args:
        simulation: has the layers.
        processes: how many share them.
        device: the kind of device.
    """
    if processes == 1:
        return 0
    layers = [list(block.parameters()) for block in simulation.runner.blocks.values()]
    inner = {id(p) for layer in layers for p in layer}
    rest = [p for p in simulation.module.parameters() if id(p) not in inner]
    gathered = [_whole(layer, processes) for layer in layers]
    pairs = [a + b for a, b in pairwise(gathered)] or gathered or [0]
    sent = max(_whole((p for p in unit if p.requires_grad), processes) for unit in [*layers, rest])
    copied = max(gathered, default=0) if device == "cpu" else 0
    return _whole(rest, processes) + max(pairs) + copied + 2 * sent


def _whole(parameters: Iterable[nn.Parameter], processes: int) -> int:
    return sum(processes * shard_bytes(p, processes) for p in parameters)
