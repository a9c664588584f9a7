"""The measurements of a training step: time in alternated rounds, bytes kept for the backward pass, peak memory."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from benchmarks.hardware import Stopwatch, allocator_peak, device
from benchmarks.train.contestants import Entry, Live
from benchmarks.train.models import Base
from benchmarks.turns import all_ready, in_turns

__all__ = ["Measured", "Timing", "contest", "mismatches", "peak_bytes", "saved_bytes"]


@dataclass
class Timing:
    """The seconds of every round, in order.

    Attributes:
        forward: the time of the forward pass with its loss, by CUDA events on a GPU, otherwise by the wall clock.
        backward: the time of the backward pass, in the same way.
        processor: processor time of all threads in both passes, which other work on the machine disturbs less.
    """

    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)

    @property
    def step(self) -> list[float]:
        """The seconds of forward and backward pass together."""
        return [a + b for a, b in zip(self.forward, self.backward, strict=True)]


@dataclass
class Measured:
    """The measurements of one entry.

    Attributes:
        entry: the entry.
        trained: the number of parameters that train.
        loss: the loss of the first step.
        saved: the bytes that the forward pass keeps for the backward pass, excluding the model's tensors.
        peak: the bytes allocated at the peak of a step, over those before it.
        timing: the times of the rounds.
    """

    entry: Entry
    trained: int
    loss: float
    saved: int
    peak: int
    timing: Timing = field(default_factory=Timing)


class _Held:
    """A wrapper that autograd keeps instead of a saved tensor: it is alive exactly as long as the graph needs it."""

    __slots__ = ("__weakref__", "tensor")

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes(forward: Callable[[], Tensor], model: nn.Module) -> int:
    """Return the bytes that are kept for the backward pass once the forward pass is over.

    Every saved tensor that is still alive then counts with its storage; tensors that share a storage count once.
    Addresses are compared while all of them are alive, since an address can be reused later.
    """
    alive: weakref.WeakSet[_Held] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Held:
        # The undetached result of an operator would keep its own graph alive, and freed tensors would count.
        kept = _Held(tensor.detach())
        alive.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = forward()
    owned = {_storage(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    dense = [tensor for kept in alive for tensor in _dense(kept.tensor)]
    sizes = {_storage(tensor): tensor.untyped_storage().nbytes() for tensor in dense}
    del loss
    return sum(size for storage, size in sizes.items() if storage not in owned)


def _dense(tensor: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors that have the storage of a tensor: a sparse one consists of indices and values."""
    return (tensor._indices(), tensor._values()) if tensor.is_sparse else (tensor,)


def _storage(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


def peak_bytes(step: Callable[[], None]) -> int:
    """Return the most that torch's allocator has given out during a step, over what it had before."""
    if device().type == "cuda":
        return allocator_peak(step)
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    events = recorded.kineto_results.events()
    changes = [(event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]"]
    level = peak = 0
    for _, change in sorted(changes, key=lambda change: change[0]):
        level += change
        peak = max(peak, level)
    return peak


def contest(
    entries: Sequence[Entry], base: Base, rounds: int, *, warmup: int = 2, tell: Callable[[str], None] = print
) -> tuple[list[Measured], dict[str, str]]:
    """Put every entry on the base, measure what it keeps, then time all of them in turns.

    Args:
        entries: the entries in the order of their turns; each round starts with a different one.
        base: the base that they share.
        rounds: the number of turns of each.
        warmup: the number of steps of each before anything is timed.
        tell: called with lines on the progress.

    Returns:
        The measurements, and the reason by the name of each entry that could not run.
    """

    def make(entry: Entry) -> tuple[Measured, Live]:
        live = entry.make(base)
        measured = _prepared(entry, live, base, warmup)
        tell(f"{entry.name}: {measured.saved / 1e6:.1f} MB saved, {measured.peak / 1e6:.1f} MB at the peak")
        return measured, live

    ready, skipped = all_ready(entries, make, tell)
    in_turns(ready, rounds, lambda one, number: _timed(one[0].timing, one[1], base, seed=number), tell)
    return [measured for measured, _ in ready], skipped


def _prepared(entry: Entry, live: Live, base: Base, warmup: int) -> Measured:
    torch.manual_seed(0)
    with torch.no_grad():
        loss = float(live.loss())
    for _ in range(warmup):
        _step(live, base)
    torch.manual_seed(0)
    saved = saved_bytes(live.loss, base.model)
    peak = peak_bytes(lambda: torch.autograd.backward(live.loss()))
    _clear(live, base)
    return Measured(entry, live.trained, loss, saved, peak)


def _step(live: Live, base: Base) -> None:
    torch.autograd.backward(live.loss())
    _clear(live, base)


def _timed(timing: Timing, live: Live, base: Base, seed: int) -> None:
    torch.manual_seed(seed)
    watch, processor = Stopwatch(), time.process_time()
    loss = live.loss()
    watch.mark()
    torch.autograd.backward(loss)
    watch.mark()
    timing.processor.append(time.process_time() - processor)
    forward, backward = watch.seconds()
    timing.forward.append(forward)
    timing.backward.append(backward)
    del loss
    _clear(live, base)


def _clear(live: Live, base: Base) -> None:
    base.embeddings.grad = None
    live.model.zero_grad(set_to_none=True)


def mismatches(found: Sequence[Measured], tolerance: float = 1e-4) -> Mapping[str, float]:
    """Return the relative differences of entries whose loss must equal their peer's but does not, by name."""
    losses = {measured.entry.name: measured.loss for measured in found}
    wrong = {}
    for measured in found:
        if measured.entry.exact and measured.entry.peer in losses:
            expected = losses[measured.entry.peer]
            difference = abs(measured.loss - expected) / abs(expected)
            if not difference <= tolerance:
                wrong[measured.entry.name] = difference
    return wrong
