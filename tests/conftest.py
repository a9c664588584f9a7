"""Test settings: no network, a capture cache of this run's own, fixed seeds."""

from __future__ import annotations

import os
import shutil
import tempfile

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Worker processes inherit the folder from the first process, which alone made it and removes it.
_OWN_CACHE = None if "GRAFTC_CACHE" in os.environ else tempfile.mkdtemp(prefix="graftc-test-captures-")
if _OWN_CACHE is not None:
    os.environ["GRAFTC_CACHE"] = _OWN_CACHE
# Two processes that compile the same kernel into one folder read each other's half-written files.
_WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(os.environ["GRAFTC_CACHE"], f"inductor-{_WORKER}")
# Workers of pytest-xdist inherit the width of the terminal, which tables would be fitted to.
os.environ.pop("COLUMNS", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the cache that this process made."""
    if _OWN_CACHE is not None:
        shutil.rmtree(_OWN_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
