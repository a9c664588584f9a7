"""Requests from several threads to a model whose adapters come and go, each compared with its adapter alone."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import graftc
from graftc.specs.errors.diagnostics import GraftError

IDS = torch.tensor([[7, 3, 44, 21, 9, 80]])
TARGETS = ["q_proj", "v_proj", "down_proj"]
TENSORS = "adapter_model.safetensors"


def adapter_folders(model: nn.Module, top: Path, names: Sequence[str]) -> dict[str, Path]:
    """Write a folder of PEFT's for each name, with random LoRAs of different ranks and scales of a model."""
    from tests.runtime.interop.adapters import written

    kinds = [{"r": 3, "lora_alpha": 5}, {"r": 2, "lora_alpha": 6, "use_rslora": True}, {"r": 4, "lora_alpha": 3}]
    like = [written(model, top / f"like{n}", target_modules=TARGETS, **kind) for n, kind in enumerate(kinds)]
    folders = {}
    for number, name in enumerate(names):
        folders[name] = Path(shutil.copytree(like[number % len(like)], top / name))
        generator = torch.Generator().manual_seed(number)
        tensors = load_file(folders[name] / TENSORS)
        save_file(
            {k: torch.randn(t.shape, generator=generator) / 4 for k, t in tensors.items()}, folders[name] / TENSORS
        )
    return folders


def resident_bytes() -> int:
    """Return how much memory of this process is resident."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@dataclass
class Traffic:
    """Requests from several threads, among which adapters are loaded, evicted, replaced and renamed.

    Attributes:
        compiled: the model, with a bank of slots.
        pool: the pool of adapters.
        folders: the adapters' folders, by name.
        expected: the logits of `IDS` for each adapter alone.
        done: the number of requests so far.
        wrong: what went wrong.
        sizes: resident bytes after some numbers of requests.
        measured: these numbers.
    """

    compiled: Any
    pool: graftc.AdapterPool
    folders: dict[str, Path]
    expected: dict[str, Tensor]
    measured: Sequence[int] = ()
    done: int = 0
    wrong: list[str] = field(default_factory=list)
    sizes: dict[int, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, requests: int, threads: int = 8) -> None:
        """Serve a number of requests, and return when all threads have ended."""
        workers = [threading.Thread(target=self._serve, args=(requests, seed)) for seed in range(threads)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()

    def _serve(self, requests: int, seed: int) -> None:
        drawn = random.Random(seed)
        while True:
            with self._lock:
                if self.done >= requests or self.wrong:
                    return
                self.done += 1
                if self.done in self.measured:
                    self.sizes[self.done] = resident_bytes()
            try:
                self._request(drawn)
            except Exception as error:
                self.wrong.append(repr(error))

    def _request(self, drawn: random.Random) -> None:
        kind = drawn.random()
        names = [drawn.choice(list(self.folders)) for _ in range(drawn.choice((1, 1, 2, 4)))]
        if kind < 0.1:  # another adapter under the same name, which stays right
            _unless_absent(lambda: self.pool.bank.replace(names[0], self.folders[names[0]]))
        elif kind < 0.2:
            _unless_absent(lambda: self.pool.bank.evict(names[0]))
        elif kind < 0.25:  # adapters of one's own, beside those of the pool
            own = f"{names[0]} of {threading.get_ident()}"
            _unless_absent(lambda: self.pool.bank.add(own, self.folders[names[0]]))
            _unless_absent(lambda: self._check([own], names[:1], own))
            _unless_absent(lambda: self.pool.bank.evict(own))
        with self.pool.use(*names) as rows:
            self._check(names, names, rows)

    def _check(self, names: Sequence[str], like: Sequence[str], chosen: Any) -> None:
        with torch.no_grad():
            logits = self.compiled(input_ids=IDS.expand(len(names), -1), adapter_ids=chosen, use_cache=False).logits
        for name, row in zip(like, logits, strict=True):
            if not torch.allclose(row, self.expected[name], atol=1e-4):
                closest = min(self.expected, key=lambda other: float((row - self.expected[other]).abs().max()))
                self.wrong.append(f"{name}: the row is nearest to {closest}")


def _unless_absent(change: Callable[[], object]) -> None:
    """Make a change, unless an adapter is in no slot, is active or finds no room."""
    try:
        change()
    except GraftError as error:
        if error.code not in ("GC038", "GC190"):
            raise


def traffic(model: nn.Module, top: Path, adapters: int, slots: int, measured: Sequence[int] = ()) -> Traffic:
    """Return requests to a model with some slots beside the active adapter, which all requests leave alone."""
    names = [f"user-{number}" for number in range(adapters)]
    folders = adapter_folders(model, top, names)
    compiled = graftc.import_peft({"first": top / "like0"}, model, bank=True, slots=slots, rank=4)
    pool = graftc.AdapterPool(compiled, lambda name: folders[name])
    bank = pool.bank
    expected = {}
    for name, folder in folders.items():
        bank.add(name, folder)
        with torch.no_grad():
            expected[name] = compiled(input_ids=IDS, adapter_ids=name, use_cache=False).logits[0]
        bank.evict(name)
    return Traffic(compiled, pool, folders, expected, measured)
