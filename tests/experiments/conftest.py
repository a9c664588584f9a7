"""Runs of these tests leave the threads and the environment of their process as they are."""

from __future__ import annotations

import pytest

from experiments import running


@pytest.fixture(autouse=True)
def _restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "_one_thread", lambda: None)
    for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, "1")
