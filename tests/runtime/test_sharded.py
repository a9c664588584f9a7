"""Tensors that FSDP2 has sharded over processes are gathered wherever their values are read."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.cli.support import ROOT

PROCESSES = 2


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package here")
def test_a_sharded_model_folds_saves_and_loads(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.sharded_worker", str(rank), str(PROCESSES), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        for rank in range(PROCESSES)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for process, text in zip(started, said, strict=True):
        assert process.returncode == 0 and text.endswith("done\n"), text
