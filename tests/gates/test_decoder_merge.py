"""Merging a real decoder: speed compared with peft, memory, and scaling with layers; one thread, processor times."""

from __future__ import annotations

import statistics
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from graftc.applications.demo.decoder import load_decoder
from tests.kit.models import adapted
from tests.kit.settings import one_thread
from tests.kit.specs import lora

ROLES = ["attn.q", "attn.k", "attn.v", "attn.o", "ffn.gate", "ffn.up", "ffn.down"]
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 8

pytestmark = pytest.mark.gate


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Run both sides on one thread."""
    with one_thread():
        yield


def adapted_decoder(layers: int | None = None) -> Any:
    """Return a perturbed LoRA on all seven projections of the decoder or of its first layers."""
    return adapted(load_decoder(layers).requires_grad_(False), lora(ROLES, rank=RANK))


def seconds(work: Callable[[], object], times: int = 3) -> float:
    """Return the least processor time of several runs."""
    measured: list[float] = []
    for _ in range(times):
        start = time.process_time()
        work()
        measured.append(time.process_time() - start)
    return min(measured)


def seconds_beside_peft(work: Callable[[], object], rounds: int = 7) -> tuple[float, float]:
    """Return the median times that the work takes and that peft takes to merge the same update.

    Both include the checks for finite values, and runs alternate. A model that peft has merged cannot be merged again,
    so each round has its own.
    """
    import peft

    ours: list[float] = []
    theirs: list[float] = []
    for _ in range(rounds):
        ours.append(seconds(work, times=1))
        model = peft.get_peft_model(load_decoder(), peft.LoraConfig(r=RANK, target_modules=PROJECTIONS))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
        theirs.append(seconds(partial(model.merge_and_unload, safe_merge=True), times=1))
    return statistics.median(ours), statistics.median(theirs)


def anonymous() -> int:
    """Return the bytes of this process's memory that no file backs."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Anonymous:"))


def rise(work: Callable[[], object]) -> int:
    """Return by how much anonymous memory rises while the work runs."""
    before = most = anonymous()
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.wait(0.005):
            most = max(most, anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    kept = work()
    done.set()
    watcher.join()
    del kept
    return most - before


def test_smollm2_merge() -> None:
    """A merge takes at most four times peft's time and at most 1.2 times the weights in additional memory."""
    compiled = adapted_decoder()
    weights = sum(p.numel() * p.element_size() for p in compiled.compilation.source.parameters())
    more = rise(compiled.merge)
    merged = compiled.merge()
    assert merged.certificate.passed and len(merged.certificate.sites) == 210
    del merged
    ours, theirs = seconds_beside_peft(compiled.merge)
    print(f"merge {ours:.2f} s, peft {theirs:.2f} s; {more / weights:.2f} of the weights beside them")
    assert more <= 1.2 * weights
    assert ours <= 4 * theirs


def test_layers_linear() -> None:
    """Four times the layers take at most 4.5 times as long."""
    few, many = (seconds(adapted_decoder(layers).merge) for layers in (6, 24))
    print(f"6 layers {few:.2f} s, 24 layers {many:.2f} s")
    assert many <= 4.5 * few
