"""The benchmark of whole training steps on a CUDA device: its accounting agrees with the allocator."""

from __future__ import annotations

import pytest
import torch

from benchmarks.sparse.entries import ENTRIES, TINY_SHAPE, base_in
from benchmarks.sparse.memory import measure
from benchmarks.sparse.times import contest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def test_lora_is_timed_and_its_memory_counted() -> None:
    entries = [entry for entry in ENTRIES if entry.name in ("peft LoRA", "graftc LoRA")]
    results, skipped = contest(entries, base_in(TINY_SHAPE, "float32", "cuda"), False, 2, tell=lambda line: None)
    assert not skipped and all(min(timed.seconds) > 0 for timed in results)
    for entry in entries:
        figures = measure(entry, TINY_SHAPE, "float32", False, "cuda")
        assert figures["peak_bytes"] == figures["witness_bytes"] > figures["base_bytes"] > 0
        # The allocator rounds every block up to 512 bytes, and reports the rounded size to the profiler.
        assert figures["accounted_bytes"] == pytest.approx(figures["witness_bytes"], rel=0.1)
