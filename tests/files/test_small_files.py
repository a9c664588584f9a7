"""Readers take memory for what a file contains, not for what it might contain."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import graftc
from graftc.runtime.training.curves import read_log
from graftc.testing.families import tiny
from tests.runtime.streaming.support import sharded_base, written_lora

MOST = 64 * 2**20
"""Bytes: several times what is read here, and a quarter of what each of these files may have."""


def _index(folder: Path) -> Callable[[], Any]:
    base = sharded_base(folder / "base", dtype=torch.float32)
    adapter = written_lora(folder / "adapter", base)
    return lambda: graftc.merge_checkpoint(adapter, base, folder / "merged")


def _capture(folder: Path) -> Callable[[], Any]:
    spec = {"adapt": [{"method": "lora", "target": {"role": "attn.q"}}]}
    assert graftc.compile(spec, tiny("bert")).compilation is not None
    return lambda: graftc.compile(spec, tiny("bert"))


def _state(folder: Path) -> Callable[[], Any]:
    entries = [{"step": step, "loss": 1.0} for step in range(3)]
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": entries}))
    return lambda: read_log(folder / "trainer_state.json")


READ = {"an index": _index, "a kept capture": _capture, "a Trainer's state": _state}


@pytest.mark.slow
@pytest.mark.sample("an index", "a Trainer's state")
@pytest.mark.parametrize("kind", READ)
def test_small_files_take_little(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRAFTC_CACHE", str(tmp_path / "cache"))
    read = READ[kind](tmp_path)
    tracemalloc.start()
    try:
        assert read() is not None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < MOST
