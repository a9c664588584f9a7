"""A model that FSDP2 has sharded over two processes; `tests/gates/test_distributed.py` has all the tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.runtime.processes import together

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch has no distributed package here")


@pytest.mark.full
def test_a_sharded_model_trains_and_is_saved_as_a_whole_one(tmp_path: Path) -> None:
    together("tests.runtime.model.distributed_jobs:brief", 2, tmp_path)


@pytest.mark.full
def test_a_quantised_base_is_sharded(tmp_path: Path) -> None:
    together("tests.runtime.model.distributed_jobs:quantised", 2, tmp_path)


@pytest.mark.full
def test_a_call_that_one_process_makes_alone_is_an_error(tmp_path: Path) -> None:
    together("tests.runtime.model.distributed_jobs:alone", 2, tmp_path, seconds=5)
    together("tests.runtime.model.distributed_jobs:apart", 2, tmp_path)
