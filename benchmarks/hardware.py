"""The device of a benchmark, its clock and its memory: a GPU if torch has one, otherwise the processor."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def device() -> torch.device:
    """Return the device on which models are made and timed."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Stopwatch:
    """Measures the seconds between marks; the first one is set when it is created.

    On a GPU, a mark is a CUDA event, which is passed once the work before it is done. Otherwise, it is a reading of the
    wall clock.

    Args:
        on: the device; by default that of the benchmark.
    """

    def __init__(self, on: torch.device | None = None) -> None:
        self._device = device() if on is None else on
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # so that work queued before does not count
        self.mark()

    def mark(self) -> None:
        """Set a mark."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            self._events.append(event)
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Return the seconds from each mark to the next one, once the device has passed all of them."""
        if self._device.type != "cuda":
            return [later - earlier for earlier, later in zip(self._times, self._times[1:], strict=False)]
        self._events[-1].synchronize()
        pairs = zip(self._events, self._events[1:], strict=False)
        return [earlier.elapsed_time(later) / 1e3 for earlier, later in pairs]


def allocator_peak(step: Callable[[], None]) -> int:
    """Return the most that CUDA's allocator has given out during a step, over what it had before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
