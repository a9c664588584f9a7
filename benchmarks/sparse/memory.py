"""Peak memory of training steps: all allocations of torch, and the resident set that the system reports.

    python -m benchmarks.sparse.memory --entry NAME --dtype bfloat16 [--checkpointing] [--device cuda] SHAPE

Prints one line of JSON; `in_process_of_its_own` runs it.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.sparse.entries import ENTRIES, TINY_SHAPE, WINDOW, Entry, Training, base_in
from benchmarks.train.contestants import UnavailableError
from benchmarks.train.models import Base, Shape

__all__ = ["Accounted", "accounted", "in_process_of_its_own", "measure"]

WARMUP, PLAIN_STEPS = 2, 3
_STEP, _CLEARED, _GRADIENT = "bench: step", "bench: cleared", "bench: gradient "

ENVIRONMENT = {
    # Freed memory returns to the system at once, so that the resident set follows the allocations.
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
    "MKL_DISABLE_FAST_MM": "1",
}


@dataclass(frozen=True)
class Accounted:
    """The results of counting allocations, in bytes.

    Attributes:
        peaks: the most that was allocated at one time, by step.
        gradients: the complete gradients among the allocations at the peak of all steps.
        between: the bytes allocated after the last step.
    """

    peaks: list[int]
    gradients: int
    between: int

    @property
    def peak(self) -> int:
        """The peak of all steps."""
        return max(self.peaks)


def accounted(make: Callable[[], Training], steps: int, warmup: int = WARMUP, device: str = "cpu") -> Accounted:
    """Count every allocation from before the model is made until the last step is over.

    The profiler does not see that a block is freed on a CPU if it did not see its allocation: replaced state would
    count twice if it began later. Allocations before ``make`` is called do not count.

    Args:
        make: makes the model and its optimiser.
        steps: the number of steps that count.
        warmup: the number of steps before them.
        device: the device whose memory counts.
    """

    def complete(parameter: Tensor) -> None:
        gradient = parameter.grad
        assert gradient is not None
        _mark(f"{_GRADIENT}{gradient.untyped_storage().nbytes()}")

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        training = make()
        for _ in range(warmup):
            training.step()
        gc.collect()
        for parameter in training.trained:
            parameter.register_post_accumulate_grad_hook(complete)
        for _ in range(steps):
            training.clear()
            _mark(_CLEARED)
            _mark(_STEP)
            training.advance()
        _mark(_STEP)
    return _peaks(profiler, device)


def _mark(name: str) -> None:
    with record_function(name):
        pass


def _peaks(profiler: profile, device: str) -> Accounted:
    recorded = profiler.profiler
    assert recorded is not None and recorded.kineto_results is not None
    of_device = torch.autograd.DeviceType.CUDA if device.startswith("cuda") else torch.autograd.DeviceType.CPU
    timeline: list[tuple[int, str, int]] = []
    for event in recorded.kineto_results.events():
        name = event.name()
        if name == "[memory]":
            if event.device_type() == of_device:
                timeline.append((event.start_ns(), name, event.nbytes()))
        elif name.startswith("bench: "):
            timeline.append((event.start_ns(), name, 0))
    level = gradients = at_peak = 0
    peaks: list[int] = []
    for _, name, change in sorted(timeline, key=lambda event: event[0]):
        level += change
        if name == _CLEARED:
            gradients = 0
        elif name == _STEP:
            peaks.append(level)
        elif name.startswith(_GRADIENT):
            gradients += int(name.removeprefix(_GRADIENT))
        elif peaks and level > peaks[-1]:
            if level > max(peaks):
                at_peak = gradients
            peaks[-1] = level
    return Accounted(peaks[:-1], at_peak, level)


class Witness:
    """The peak of memory as the system reports it, over the memory at the start.

    It is the resident set of this process, or on CUDA the figure of the allocator.
    """

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        gc.collect()
        self.before = torch.cuda.memory_allocated() if self.cuda else _resident("VmRSS")

    def reset(self) -> None:
        """Reset the peak."""
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            with suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")

    def peak(self) -> int | None:
        """Return the peak since `reset`; None if the system does not report it."""
        if self.cuda:
            return torch.cuda.max_memory_allocated() - self.before
        highest = _resident("VmHWM")
        return highest - self.before if highest else None


def _resident(field: str) -> int:
    """Return a memory field of ``/proc/self/status`` in bytes; 0 if the system does not report it."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{field}:")), 0)


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the storages of tensors; a shared storage counts once."""
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


def _held(training: Training) -> list[Tensor]:
    return [*training.model.parameters(), *training.model.buffers()]


def _state(training: Training) -> list[Tensor]:
    if training.optimiser is None:
        return []
    values = (value for state in training.optimiser.state.values() for value in state.values())
    return [value for value in values if isinstance(value, Tensor)]


def dtypes_of(tensors: Iterable[Tensor]) -> str:
    """Return the dtypes of tensors as text, ignoring tensors of one element, such as step counters."""
    names = {str(t.dtype).removeprefix("torch.") for t in tensors if t.numel() > 1}
    return ", ".join(sorted(names)) or "-"


def measure(entry: Entry, shape: Shape, dtype: str, checkpointing: bool, device: str = "cpu") -> dict[str, Any]:
    """Measure the peak memory of an entry's steps, preferably in a process of its own.

    Args:
        entry: the entry to measure.
        shape: the sizes of the model.
        dtype: the dtype of the base.
        checkpointing: whether activations are checkpointed.
        device: the device to run on.

    Returns:
        The figures as JSON: ``peak_bytes`` and its parts, of which gradients and ``rest_bytes`` are those at the peak,
        and the others stay between steps; ``witness_bytes``, the same peak as the system reports it; ``peaks_by_step``.

    Raises:
        UnavailableError: the entry cannot run.
    """
    parts: dict[str, Any] = {}
    live: list[Training] = []

    def make(of: Shape = shape) -> Training:
        base = base_in(of, dtype, device)
        training = entry.make(base, checkpointing)
        live[:] = [training]
        parts["base_bytes"] = _shared(training, base)
        return training

    small = make(TINY_SHAPE)  # memory that libraries load and keep must not count
    for _ in range(WARMUP):
        small.step()
    del small
    live.clear()

    witness = Witness(device)
    training = make()
    steps = PLAIN_STEPS if training.after is None else WINDOW - WARMUP + 2
    for _ in range(WARMUP):
        training.step()
    gc.collect()
    witness.reset()
    for _ in range(steps):
        training.step()
    seen = witness.peak()
    del training
    live.clear()
    gc.collect()

    counted = accounted(make, steps, device=device)
    training = live[0]
    parts["trained_bytes"] = bytes_of(_held(training)) - parts["base_bytes"]
    parts["state_bytes"] = bytes_of(_state(training))
    parts["gradient_bytes"] = counted.gradients
    gradients = [parameter.grad for parameter in training.trained if parameter.grad is not None]
    known = bytes_of([*_held(training), *_state(training), *gradients])
    peak = seen if witness.cuda and seen is not None else counted.peak
    return {
        "peak_bytes": peak,
        "accounted_bytes": counted.peak,
        "witness": "torch.cuda.max_memory_allocated" if witness.cuda else "VmHWM",
        "witness_bytes": seen,
        **parts,
        "rest_bytes": peak - sum(parts.values()),
        "held_elsewhere_bytes": counted.between - known,
        "peaks_by_step": counted.peaks,
        "base_dtype": dtype,
        "trained_dtype": dtypes_of(training.trained),
        "state_dtype": dtypes_of(_state(training)),
        "trained_parameters": sum(parameter.numel() for parameter in training.trained),
    }


def _shared(training: Training, base: Base) -> int:
    """Return the bytes of the base that an entry runs on, excluding copies that it trains."""
    storages = {t.untyped_storage()._cdata for t in [*base.model.parameters(), *base.model.buffers()]}
    return bytes_of(tensor for tensor in _held(training) if tensor.untyped_storage()._cdata in storages)


def in_process_of_its_own(
    entry: Entry, shape: Shape, dtype: str, checkpointing: bool, *, device: str = "cpu", threads: int | None = None
) -> Mapping[str, Any]:
    """Run `measure` in a new process, where nothing else has been allocated.

    Raises:
        UnavailableError: the entry cannot run.
    """
    command = [sys.executable, "-W", "ignore::FutureWarning", "-m", __name__, json.dumps(asdict(shape))]
    command += ["--entry", entry.name, "--dtype", dtype, "--device", device]
    command += ["--checkpointing"] if checkpointing else []
    command += ["--threads", str(threads)] if threads is not None else []
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, stdout=subprocess.PIPE, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "unavailable" in figures:
        raise UnavailableError(figures["unavailable"])
    return figures


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure one entry and print its figures."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sparse.memory", description="Peak memory of an entry.")
    parser.add_argument("shape", help="sizes of the model, as JSON")
    parser.add_argument("--entry", required=True, choices=[entry.name for entry in ENTRIES])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    entry = next(entry for entry in ENTRIES if entry.name == options.entry)
    shape = Shape(**json.loads(options.shape))
    try:
        figures = measure(entry, shape, options.dtype, options.checkpointing, options.device)
    except UnavailableError as reason:
        figures = {"unavailable": str(reason)}
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
