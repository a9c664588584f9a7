"""The memory that FSDP2 takes in addition to shards: layers' gathered tensors, and gradients while they are sent."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from math import prod

from torch import nn

from graftc.runtime.model.simulated_step import Simulation, shard_of


def shard_bytes(tensor: nn.Parameter, processes: int) -> int:
    """Return the size of a tensor's largest shard, in bytes."""
    return prod(shard_of(tensor, processes)) * tensor.itemsize


def communication(simulation: Simulation, processes: int, device: str) -> int:
    """Return the size of the communication buffers at the peak of a step, in bytes.

    Each layer is a sharding unit, and so is the rest of the model. The rest stays gathered from its forward to its
    backward pass. Two layers are gathered at a time: the one that runs, and the next one, which is gathered meanwhile;
    on a CPU, gloo keeps its own copy of the latter. The full gradients of one unit exist twice: as computed, and in the
    order in which they are sent.

    Args:
        simulation: the simulation with the layers.
        processes: the number of processes that share the parameters.
        device: the device type.
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
